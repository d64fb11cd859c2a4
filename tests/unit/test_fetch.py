"""Pictures by URL: what is fetched, from where, and how far."""

import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pictures import encoded, picture

from joyjax.errors import PictureError
from joyjax.media import fetch as module
from joyjax.media.fetch import MOST_REDIRECTS, fetch, is_public, is_url, parse_url
from joyjax.media.load import load_image

PICTURE = encoded(picture(), "PNG")
Handler = http.server.BaseHTTPRequestHandler


def answer(handler: Handler, status: int = 200, body: bytes = b"", **headers: object) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
        if value is not None:
            handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler: Handler, first: bytes, again: bytes) -> None:
    """Write something, and then a little now and then, as long as anybody listens."""
    handler.wfile.write(first)
    for _ in range(200):
        handler.wfile.write(again)
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: Handler) -> None:
    answer(handler, Content_Length=None)
    while True:
        handler.wfile.write(bytes(2**16))


PAGES: dict[str, Callable[[Handler], None]] = {
    "/photo.png": lambda handler: answer(handler, body=PICTURE),
    "/without-length": lambda handler: answer(handler, body=PICTURE, Content_Length=None),
    "/to-photo": lambda handler: answer(handler, 302, Location="/photo.png"),
    "/loop": lambda handler: answer(handler, 301, Location="/loop"),
    "/nowhere": lambda handler: answer(handler, 302),
    "/to-file": lambda handler: answer(handler, 302, Location="file:///etc/passwd"),
    "/to-password": lambda handler: answer(handler, 302, Location="http://me:secret@127.0.0.1/photo.png"),
    "/to-metadata": lambda handler: answer(handler, 302, Location="http://169.254.169.254/latest"),
    "/to-loopback": lambda handler: answer(handler, 307, Location="http://127.0.0.2/photo.png"),
    "/page": lambda handler: answer(handler, body=b"<!DOCTYPE html><html><body>Sign in</body></html>"),
    "/empty": lambda handler: answer(handler),
    "/large": lambda handler: answer(handler, body=b"", Content_Length=2**40),
    "/cut-off": lambda handler: answer(handler, body=PICTURE[:-20], Content_Length=len(PICTURE)),
    "/says-less": lambda handler: answer(handler, body=PICTURE, Content_Length=len(PICTURE) // 2),
    "/chunks-cut-off": lambda handler: answer(
        handler, body=b"99\r\nabc", Content_Length=None, Transfer_Encoding="chunked"
    ),
    "/compressed": lambda handler: answer(handler, body=b"x", Content_Encoding="br"),
    "/login": lambda handler: answer(handler, 403),
    "/broken": lambda handler: answer(handler, 503),
    "/endless": endless,
    "/slow-body": lambda handler: drip(handler, b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
    "/slow-header": lambda handler: drip(handler, b"HTTP/1.0 200 OK\r\n", b"X-A: b\r\n"),
    "/slow-line": lambda handler: drip(handler, b"HTTP/1.0 200 O", b"K"),
    "/silent": lambda handler: time.sleep(5),
    "/garbage": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:  # a client that has enough goes away
        pass


@contextlib.contextmanager
def serving(seen: list[tuple[str, str | None]], context: ssl.SSLContext | None = None) -> Iterator[int]:
    class Pages(Handler):
        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            seen.append((self.path, self.headers["Host"]))
            page = PAGES.get(self.path.partition("?")[0])
            answer(self, 404) if page is None else page(self)

        def log_message(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Pages) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def seen() -> list[tuple[str, str | None]]:
    """The paths that the server was asked for, each with its Host."""
    return []


@pytest.fixture
def at(seen, monkeypatch) -> Iterator[str]:
    """Where the server is."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving(seen) as port:
        yield f"http://127.0.0.1:{port}"


def refused(url: str, *says: str, **options) -> str:
    with pytest.raises(PictureError) as caught:
        fetch(url, **{"allow_private": True, **options})
    message = str(caught.value)
    assert all(text in message for text in says), message
    assert "\n" not in message
    return message


def resolve(monkeypatch, *answers: str) -> list[str]:
    """Have every name resolve to an address, the last one again and again; return the names that are asked for."""
    asked: list[str] = []

    def look_up(host, port, *_, **__):
        asked.append(host)
        address = answers[min(len(asked), len(answers)) - 1]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize("page", ["/photo.png", "/without-length", "/to-photo", "/photo.png?size=large&name=a b"])
def test_a_picture_is_fetched(page, at):
    data, shown = fetch(at + page, allow_private=True)
    assert data == PICTURE
    assert shown == at + page.partition("?")[0] + ("?…" if "?" in page else "")
    image = load_image(at + page, allow_private_urls=True)
    assert image.tobytes() == picture().tobytes()
    assert not hasattr(image, "filename")  # a recipe has no file to name
    assert image.location == shown


REFUSED = {  # a page, and what is said of it
    "/none.png": ["was answered with 404", "check the address"],
    "/login": ["403", "login"],
    "/broken": ["503", "try again later"],
    "/nowhere": ["redirects without a target"],
    "/loop": [f"redirects more than {MOST_REDIRECTS} times"],
    "/to-file": ["redirects to a URL that is refused", "a file: URL cannot be read"],
    "/large": ["more than 67,108,864 bytes"],
    "/endless": ["more than 67,108,864 bytes"],
    "/cut-off": ["ended after", "20 missing"],
    "/chunks-cut-off": ["ended after"],
    "/compressed": ["compressed"],
    "/garbage": ["did not answer as a web server does"],
}


@pytest.mark.parametrize("page", REFUSED)
def test_what_is_no_picture_is_refused(page, at):
    refused(at + page, f"{at}{page} ", *REFUSED[page])


def test_a_redirect_is_followed_a_few_times_only(at, seen):
    refused(at + "/loop", "redirects")
    assert len(seen) == MOST_REDIRECTS + 1


@pytest.mark.parametrize("page", ["/slow-body", "/slow-header", "/slow-line", "/silent"])
def test_the_whole_download_has_a_time_limit(page, at):
    started = time.monotonic()
    refused(at + page, f"{at}{page} did not arrive within 0.4 s", seconds=0.4)
    assert time.monotonic() - started < 3


def test_a_name_that_takes_long_to_resolve_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    refused("http://slow.test/photo.png", "did not arrive within 0.2 s", seconds=0.2)


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("/page", "is an HTML page, not a picture"),
        ("/empty", "is empty"),
        ("/says-less", "broken or cut off|cannot be read"),
    ],
)
def test_an_answer_that_is_no_picture(page, says, at):
    with pytest.raises(PictureError, match=f"^{at}{page} .*({says})"):
        load_image(at + page, allow_private_urls=True)


PRIVATE = [
    *["127.0.0.1", "127.8.9.10", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"],
    *[
        "192.0.0.8",
        "192.88.99.1",
        "198.18.0.1",
        "203.0.113.5",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
    ],
    *["::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "100::1"],
    *["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::1", "2002:c0a8:101::"],
    *["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2001:0:7f00:1::", "3fff::1"],
]
PUBLIC = ["8.8.8.8", "193.0.0.1", "2a00:1450:4001:80b::200e", "64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public_is_never_connected_to(address, monkeypatch):
    assert not is_public(address)
    resolve(monkeypatch, address)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    refused("http://pictures.test/photo.png", "pictures.test", "not a public address", allow_private=False)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_may_be_connected_to(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "0"])
def test_this_machine_in_every_spelling(host):
    refused(f"http://{host}:9/photo.png", "not a public address", "--allow-private-urls", allow_private=False)


@pytest.mark.parametrize("page", ["/to-metadata", "/to-loopback"])
def test_a_redirect_is_checked_as_the_first_address_was(page, at, monkeypatch):
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    says = refused(at + page, f"{at}{page} (redirected to http://", "not a public address", allow_private=False)
    assert "169.254.169.254" in says or "127.0.0.2" in says
    assert fetch(at + "/to-photo")[0] == PICTURE


def test_a_name_is_resolved_once_and_connected_to_as_it_was_checked(at, seen, monkeypatch):
    """A second look-up, which could give another address than the one that was checked, never comes."""
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    asked = resolve(monkeypatch, "127.0.0.1", "169.254.169.254")
    port = at.rpartition(":")[2]
    assert fetch(f"http://pictures.test:{port}/photo.png")[0] == PICTURE
    assert asked == ["pictures.test"]
    assert seen == [("/photo.png", f"pictures.test:{port}")]
    refused(f"http://pictures.test:{port}/photo.png", "not a public address", allow_private=False)  # its next answer


@pytest.fixture
def certificate(tmp_path) -> Path:
    """A certificate of pictures.test with its key, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path / "server.pem"
    key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test"]
    files = ["-keyout", path, "-out", tmp_path / "certificate.pem"]
    subprocess.run(["openssl", *key, *name, *files], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "certificate.pem").read_bytes())
    return path


def test_tls_checks_the_name_of_the_url(certificate, seen, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    names: list[str | None] = []
    context.sni_callback = lambda sock, name, context: names.append(name)
    with serving(seen, context) as port:
        resolve(monkeypatch, "127.0.0.1")
        refused(f"https://pictures.test:{port}/photo.png", "has a certificate that is not valid")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("certificate.pem")))
        assert fetch(f"https://pictures.test:{port}/photo.png", allow_private=True)[0] == PICTURE
        refused(f"https://other.test:{port}/photo.png", "has a certificate that is not valid")
    assert names == ["pictures.test", "pictures.test", "other.test"]
    assert seen == [("/photo.png", f"pictures.test:{port}")]


def test_what_cannot_be_reached(at, monkeypatch):
    refused(at.replace("http", "https") + "/photo.png", "did not answer with TLS", "http:// in place of https://")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/photo.png"
        assert "proxy" not in refused(url, "cannot be fetched: Connection refused")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
        refused(url, "joyjax does not use the proxy of the environment", "--image -")

    def fails(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    refused("https://pictures.test/photo.png", "there is no address of pictures.test")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/photo.png", "a ftp: URL cannot be read, only http and https"),
        ("file:///etc/passwd", "a file: URL"),
        ("s3://bucket/photo.png", "a s3: URL"),
        ("data:image/png;base64,secret", "a data: URL"),
        ("http://", "names no host"),
        ("http:///photo.png", "names no host"),
        ("http://host:secret/photo.png", "is not valid"),
        ("http://host:99999/", "is not valid"),
        ("http://[::1/", "is not valid"),
        ("http://a b/", "names no host"),
        ("http://host/\r\nX-Header: secret", "printable"),
        ("http://host/\0", "printable"),
        ("http://host/" + "a" * 9000, "9012 characters"),
        ("http://" + "a" * 64 + ".test/", "is not valid"),
        ("https://me:secret@host/photo.png", "the URL of host holds a user name or password"),
        ("https://secret@host/photo.png", "holds a user name"),
        ("https://me:sec/ret@host/photo.png", "is not valid"),
    ],
)
def test_an_invalid_url_is_refused(url, says, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    assert is_url(url)
    message = refused(url, says)
    assert "secret" not in message
    assert len(message) < 300


def test_a_password_in_a_redirect_is_not_sent(at, seen):
    assert "secret" not in refused(at + "/to-password", "redirects to a URL that is refused", "user name or password")
    assert [path for path, _ in seen] == ["/to-password"]


def test_a_message_shows_no_query(at):
    message = refused(at + "/none.png?token=secret#part", f"{at}/none.png?… was answered")
    assert "secret" not in message
    assert "part" not in message


def test_a_url_as_people_write_it():
    target = parse_url("HTTPS://Bücher.example:8443/föto one.jpg?q=ä#top")
    assert (target.scheme, target.host, target.port) == ("https", "xn--bcher-kva.example", 8443)
    assert target.path == "/f%C3%B6to%20one.jpg?q=%C3%A4"
    assert target.shown == "https://xn--bcher-kva.example:8443/föto one.jpg?…"
    assert parse_url("http://[2a00::1]/").url == "http://[2a00::1]/"
    assert parse_url("http://host.").host == "host"
    assert [is_url(name) for name in ("photo.png", "C:/photo.png", "a/b", "-", "./http:/x", "http:/x")] == [False] * 6
