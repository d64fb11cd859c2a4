"""Downloading a picture from a URL: bounded in bytes, time and redirects, and from public addresses only.

URLs are untrusted, as in a file of requests. A host name is resolved once, and the connection goes to an address that
was checked, so DNS rebinding has no effect; each redirect is checked likewise. Proxies of the environment are not used:
a proxy resolves names itself, which would bypass the check.
"""

import contextlib
import dataclasses
import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NoReturn

from joyjax.errors import PictureError
from joyjax.version import VERSION

MOST_BYTES = 64 * 2**20
SECONDS = 120.0  # for the whole download, including DNS and redirects
CONNECT_SECONDS = 15.0  # for one address of several
MOST_REDIRECTS = 5
LONGEST_URL = 8192
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 2**16
BY_HAND = "download it, and give the file"

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is allocated for the public internet
# IANA's special-purpose registries, multicast and reserved blocks; older Pythons have only some of them.
SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "
        "2001::/23 2001:db8::/32 3fff::/20".split(),
    )
)
LIKE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.ASCII)

SocketAddress = tuple[socket.AddressFamily, Any]  # as connect takes it


@dataclasses.dataclass(frozen=True)
class Target:
    """A checked URL: its host and port, the path to request, and `shown`, the form for messages, without the query."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    shown: str


def is_url(location: str) -> bool:
    """Return whether a location is a URL, of any scheme, rather than a file name."""
    return LIKE_URL.match(location) is not None


def fetch(
    url: str, *, allow_private: bool = False, seconds: float = SECONDS, most_bytes: int = MOST_BYTES
) -> tuple[bytes, str]:
    """Return the body at a URL, and the URL for messages.

    `allow_private`: addresses that are not public, such as private and loopback ones, are allowed, also in redirects.

    Raises:
        PictureError: naming the URL and the reason.
    """
    deadline = time.monotonic() + seconds
    first = target = parse_url(url)
    for _ in range(MOST_REDIRECTS + 1):
        name = first.shown if target is first else f"{first.shown} (redirected to {target.shown})"
        try:
            found = _get(target, allow_private, deadline, most_bytes)
        except PictureError as error:
            raise PictureError(f"{name} {error}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline
            reason = f"did not arrive within {seconds:g} s; {BY_HAND}" if late else _reason(error, target)
            raise PictureError(f"{name} {reason}") from error
        if isinstance(found, bytes):
            return found, first.shown
        try:
            target = parse_url(urllib.parse.urljoin(target.url, found))
        except PictureError as error:
            raise PictureError(f"{first.shown} redirects to a URL that is refused: {error}") from None
        except ValueError:
            raise PictureError(f"{first.shown} redirects to an invalid URL; {BY_HAND}") from None
    raise PictureError(f"{first.shown} redirects more than {MOST_REDIRECTS} times; {BY_HAND}")


def parse_url(url: str) -> Target:
    """Parse and check a URL.

    Raises:
        PictureError: unless it is a complete http or https URL without a user name or password.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise PictureError(f"a {scheme[:20]}: URL cannot be read, only http and https; {BY_HAND}")
    if len(url) > LONGEST_URL or not url.isprintable():
        raise PictureError(
            f"a URL ({scheme}://…) has {len(url)} characters, some of them perhaps control characters; expected up to "
            f"{LONGEST_URL} printable ones"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        host = host if ":" in host else host.encode("idna").decode()
        port = parts.port if parts.port is not None else (443 if scheme == "https" else 80)
    except ValueError:  # the text is not shown: it may hold a password
        raise PictureError(f"a URL ({scheme}://…) is not valid; expected one like {scheme}://host/photo.jpg") from None
    if parts.username is not None or parts.password is not None:
        raise PictureError(
            f"the URL of {host or 'a picture'} holds a user name or password, which joyjax does not send; {BY_HAND}"
        )
    if not host or not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise PictureError(f"a URL ({scheme}://…) names no host; expected one like {scheme}://host/photo.jpg")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?[]") if parts.query else ""
    netloc = f"[{host}]" if ":" in host else host
    netloc += "" if parts.port is None else f":{port}"
    shown = f"{scheme}://{netloc}{parts.path if len(parts.path) <= 100 else parts.path[:100] + '…'}"
    return Target(
        url=f"{scheme}://{netloc}{path}{query}",
        scheme=scheme,
        host=host,
        port=port,
        path=path + query,
        shown=shown + ("?…" if query else ""),
    )


def is_public(address: str) -> bool:
    """Return whether an IP address is public; an IPv6 address that embeds an IPv4 address counts as the latter."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip not in UNICAST:
            return False
        ip = inner or ip
    return ip.is_global and not any(ip in network for network in SPECIAL)


def _get(target: Target, allow_private: bool, deadline: float, most_bytes: int) -> bytes | str:
    """Return the body of a target as bytes, or the location of a redirect as a string."""
    with _connected(target, _addresses(target, allow_private, deadline), deadline) as connection:
        default = target.port == (443 if target.scheme == "https" else 80)
        host = f"[{target.host}]" if ":" in target.host else target.host
        headers = {
            "Host": host if default else f"{host}:{target.port}",
            "User-Agent": f"joyjax/{VERSION}",
            "Accept": "image/*, */*;q=0.1",
            "Connection": "close",
        }
        connection.request("GET", target.path, headers=headers)
        response = connection.getresponse()
        if response.status in REDIRECTS:
            return response.getheader("Location") or _fail(f"redirects without a target; {BY_HAND}")
        if response.status != 200:
            _fail(f"was answered with {response.status} {response.reason[:60]}; {_remedy(response.status)}")
        if response.getheader("Content-Encoding", "identity") != "identity":
            _fail(f"was sent compressed, which was not asked for; {BY_HAND}")
        body = _read(response, most_bytes)
        if time.monotonic() >= deadline:  # the connection may have been shut down before the end of the body
            raise TimeoutError
        return body


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    length, body = response.length, bytearray()
    if length is None or length <= most_bytes:
        while chunk := response.read(CHUNK):
            body += chunk
            if len(body) > most_bytes:
                break
    if len(body) > most_bytes or (length or 0) > most_bytes:
        _fail(f"has more than {most_bytes:,} bytes, the most that is downloaded; {BY_HAND}")
    if len(body) < (length or 0):
        raise http.client.IncompleteRead(bytes(body), (length or 0) - len(body))
    return bytes(body)


def _addresses(target: Target, allow_private: bool, deadline: float) -> list[SocketAddress]:
    """Resolve a host once, and return its allowed addresses."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=look_up, daemon=True).start()  # getaddrinfo has no timeout
    try:
        found = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    allowed = [(family, address) for family, _, _, _, address in found if allow_private or is_public(address[0])]
    if not allowed:
        _fail(
            f"is at {found[0][4][0]}, which is not a public address; {BY_HAND}, or allow it with --allow-private-urls"
        )
    return allowed


@contextlib.contextmanager
def _connected(target: Target, addresses: list[SocketAddress], deadline: float) -> Iterator[http.client.HTTPConnection]:
    """Yield a connection to the first address that answers; it is shut down at the deadline."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_first_of(addresses, deadline))
        guard = stack.enter_context(sock.dup())  # stays valid when TLS wraps the socket
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [guard])
        watch.daemon = True
        watch.start()
        stack.callback(watch.cancel)
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        if target.scheme == "https":
            sock = stack.enter_context(ssl.create_default_context().wrap_socket(sock, server_hostname=target.host))
        connection = http.client.HTTPConnection(target.host, target.port)
        stack.callback(connection.close)
        connection.sock = sock
        connection.auto_open = 0  # never resolve or connect again
        yield connection


def _first_of(addresses: list[SocketAddress], deadline: float) -> socket.socket:
    error: OSError = TimeoutError()
    for family, address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(min(left, CONNECT_SECONDS))
            sock.connect(address)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
        except BaseException:
            sock.close()
            raise
    raise error


def _shut_down(guard: socket.socket) -> None:
    with contextlib.suppress(OSError):
        guard.shutdown(socket.SHUT_RDWR)


def _fail(reason: str) -> NoReturn:
    raise PictureError(reason)


def _remedy(status: int) -> str:
    if status in (401, 403, 407):
        return f"it may need a login: {BY_HAND}"
    return "try again later" if status == 429 or status >= 500 else "check the address"


def _reason(error: Exception, target: Target) -> str:
    """Return why a download failed, as the end of a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has a certificate that is not valid ({error.verify_message}); {BY_HAND} if you trust it"
    if isinstance(error, ssl.SSLError):
        return f"did not answer with TLS ({error.reason or 'broken off'}); is it http:// in place of https://?"
    if isinstance(error, http.client.IncompleteRead):
        rest = "" if error.expected is None else f", with {error.expected:,} missing"
        return f"ended after {len(error.partial):,} bytes{rest}; try again"
    if isinstance(error, http.client.HTTPException | ValueError):
        return f"did not answer as a web server does ({type(error).__name__}); check the address"
    if isinstance(error, socket.gaierror):
        reason = f"cannot be fetched: there is no address of {target.host}; check the name and the connection"
    else:
        cause = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        reason = f"cannot be fetched: {cause}; check the address and the connection"
    if urllib.request.getproxies().get(target.scheme):
        reason += f". joyjax does not use the proxy of the environment: {BY_HAND}, or pipe it in with --image -"
    return reason
