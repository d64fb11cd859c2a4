"""Picture files of every kind: builders, also of files that Pillow does not write, and tables of unusual ones."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY16 = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
GREY16_AS_8 = np.array([[0, 0, 1, 1], [127, 128, 254, 255]], np.uint8)
COLOUR16 = np.array([[[0, 128, 129], [257, 32767, 65535]]], np.uint16)  # one row


def noise(height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)


def picture(mode: str = "RGB", height: int = 5, width: int = 7) -> Image.Image:
    if mode in ("RGBA", "LA", "PA", "CMYK", "LAB", "HSV", "YCbCr"):
        channels = noise(height, width, len(Image.new(mode, (1, 1)).getbands()))
        return Image.merge(mode, [Image.fromarray(channels[..., c]) for c in range(channels.shape[-1])])
    return Image.fromarray(noise(height, width)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, colour: int, width: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these rows of packed values; chunks come between header and data."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")
    return SIGNATURE + b"".join(png_chunk(*part) for part in parts)


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def tiff(
    width: int, height: int, bits: int, photometric: int, values: bytes, order: str = "<", samples: int = 1
) -> bytes:
    """A TIFF of one strip. Photometric 0: white is 0; 1: black is 0; 2: RGB."""
    depths = struct.pack(f"{order}{samples}H", *[bits] * samples)
    strip, behind = 8, 8 + len(values)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: strip, 277: samples, 278: height}
    tags |= {279: len(values), 284: 1}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    if samples > 1:
        one = struct.pack(f"{order}HHII", 258, 4, 1, bits)
        entries = entries.replace(one, struct.pack(f"{order}HHII", 258, 3, samples, behind))
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, behind + len(depths))
    return start + values + depths + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def palette_with_alpha_table() -> bytes:
    return encoded(picture("P"), "PNG", transparency=bytes(range(256)))


def frames(kind: str, **options) -> bytes:
    """Two frames; the second is of one colour."""
    first = picture("P" if kind == "GIF" else "RGB")
    return encoded(first, kind, save_all=True, append_images=[Image.new(first.mode, first.size)], **options)


def pgm(highest: int, values: np.ndarray) -> bytes:
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], highest) + values.astype(">u2").tobytes()


def exif(orientation: int, *entries: bytes) -> bytes:
    """EXIF data with an orientation and further entries of 12 bytes, big endian."""
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0), *entries
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(tags)) + b"".join(tags) + bytes(44)


FLOAT_AS_TEXT = struct.pack(">HHIf", 0x010F, 11, 1, 1.0)  # a float as the maker's name, which Pillow cannot write

RGB_FORM: dict[str, Callable[[], bytes]] = {  # files that are read as Pillow's conversion to RGB
    "png": lambda: encoded(picture(), "PNG"),
    "png with alpha": lambda: encoded(picture("RGBA"), "PNG"),
    "png, grey with alpha": lambda: encoded(picture("LA"), "PNG"),
    "png, palette": lambda: encoded(picture("P"), "PNG"),
    "png, palette with one transparent colour": lambda: encoded(picture("P"), "PNG", transparency=3),
    "png, palette with an alpha table": palette_with_alpha_table,
    "png, palette, no colours": lambda: png(8, 3, 2, [b"\1\2"]),
    "png, palette, a missing colour": lambda: png(8, 3, 2, [b"\1\2"], (b"PLTE", bytes(6))),
    "png, palette of two colours": lambda: png(1, 3, 9, [b"\x5a\x80"] * 2, (b"PLTE", bytes([9, 8, 7, 200, 100, 50]))),
    "png, rgb with a transparent colour": lambda: encoded(picture(), "PNG", transparency=(1, 2, 3)),
    "png, 1 bit": lambda: encoded(picture("1"), "PNG"),
    "png, grey": lambda: encoded(picture("L"), "PNG"),
    "png, grey of 2 bits": lambda: png(2, 0, 4, [b"\x1b"]),
    "png, grey with a transparent value": lambda: encoded(picture("L"), "PNG", transparency=3),
    "png, exif is garbage": lambda: encoded(picture(), "PNG", exif=b"Exif\0\0garbage"),
    "png, gamma 1": lambda: png(8, 2, 2, [bytes(range(6))], (b"gAMA", struct.pack(">I", 100_000))),
    "png, 16 bits a colour": lambda: png(16, 2, 2, [COLOUR16.astype(">u2").tobytes()]),
    "png, two frames": lambda: frames("PNG"),
    "jpeg": lambda: encoded(picture(), "JPEG"),
    "jpeg, grey": lambda: encoded(picture("L"), "JPEG"),
    "jpeg, cmyk": lambda: encoded(picture("CMYK"), "JPEG"),
    "jpeg, progressive": lambda: encoded(picture("RGB", 40, 30), "JPEG", progressive=True),
    "jpeg, exif is garbage": lambda: encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "jpeg, orientation 99": lambda: encoded(picture(), "JPEG", exif=exif(99)),
    "mpo, two pictures": lambda: frames("MPO"),
    "tiff, cmyk": lambda: encoded(picture("CMYK"), "TIFF"),
    "tiff, lab": lambda: encoded(picture("LAB"), "TIFF"),
    "tiff, 1 bit": lambda: encoded(picture("1"), "TIFF"),
    "tiff, white is 0": lambda: tiff(3, 1, 8, 0, b"\0\x40\xff"),
    "tiff, 16 bits a colour": lambda: tiff(2, 1, 16, 2, COLOUR16.astype("<u2").tobytes(), "<", 3),
    "tiff, 16 bits a colour, big endian": lambda: tiff(2, 1, 16, 2, COLOUR16.astype(">u2").tobytes(), ">", 3),
    "tiff, two pages": lambda: frames("TIFF"),
    "gif": lambda: encoded(picture("P"), "GIF"),
    "gif, two frames": lambda: frames("GIF"),
    "gif with a transparent colour": lambda: encoded(Image.new("P", (4, 3)), "GIF", transparency=0),
    "webp with alpha": lambda: encoded(picture("RGBA"), "WEBP", lossless=True),
    "webp, two frames": lambda: frames("WEBP", lossless=True),
    "jpeg 2000": lambda: encoded(picture("RGB", 16, 16), "JPEG2000"),
    "bmp": lambda: encoded(picture(), "BMP"),
    "ico": lambda: encoded(picture("RGBA", 32, 32), "ICO", sizes=[(16, 16), (32, 32)]),
    "tga": lambda: encoded(picture("RGBA"), "TGA", compression="tga_rle"),
    "ppm, 16 bits a colour": lambda: b"P6\n2 1\n65535\n" + np.arange(6, dtype=">u2").tobytes(),
    "pbm": lambda: b"P1\n3 1\n0 1 0\n",
    "one pixel": lambda: encoded(picture("RGB", 1, 1), "PNG"),
    "one row": lambda: encoded(picture("RGB", 1, 300), "PNG"),
    "one column": lambda: encoded(picture("RGB", 8192, 1), "PNG"),
    "a long strip": lambda: encoded(picture("L", 16, 20_000), "PNG"),
}
if features.check("avif"):  # from Pillow 11.3 on
    RGB_FORM["avif"] = lambda: encoded(picture("RGBA", 16, 16), "AVIF")

SCALED = {  # files of 16-bit grey, and their values in 8 bits
    "png": (lambda: encoded(Image.fromarray(GREY16), "PNG"), GREY16_AS_8),
    "png with a transparent value": (
        lambda: png(16, 0, 4, [row.astype(">u2").tobytes() for row in GREY16], (b"tRNS", struct.pack(">H", 257))),
        GREY16_AS_8,
    ),
    "tiff": (lambda: encoded(Image.fromarray(GREY16), "TIFF"), GREY16_AS_8),
    "tiff, big endian": (lambda: tiff(4, 2, 16, 1, GREY16.astype(">u2").tobytes(), ">"), GREY16_AS_8),
    "tiff, 32 bits that use 16": (lambda: encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), GREY16_AS_8),
    "jpeg 2000": (lambda: encoded(Image.fromarray(GREY16), "JPEG2000"), GREY16_AS_8),
    "pgm": (lambda: pgm(65535, GREY16), GREY16_AS_8),
    "pgm up to 1000": (lambda: pgm(1000, np.array([[0, 500, 1000]])), np.array([[0, 128, 255]], np.uint8)),
}

MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"]
