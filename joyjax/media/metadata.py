"""Storage of a recipe in a picture file: a text chunk of a PNG, XMP in the other formats.

PNG: an iTXt chunk `joyjax` holds the recipe, and a chunk `parameters` the text that other programs show, in the format
of AUTOMATIC1111's web UI. JPEG, WebP, AVIF and TIFF: the attribute `joyjax:recipe` of an XMP packet holds the recipe.
In the first three, EXIF's UserComment holds `parameters`, in UTF-16 as those programs read it.
"""

import dataclasses
import html
import os
import re
import warnings
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from joyjax.errors import PictureError, RequestError

CHUNK = "joyjax"
READ = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF")  # Pillow's names of the formats in formats.py
MOST_IN_JPEG = 65_000  # bytes of a segment, less its header
USER_COMMENT, XMP_TAG, UNDEFINED = 0x9286, 700, 7
RECIPE_IN_XMP = re.compile(r"""joyjax:recipe(?:="([^"]*)"|='([^']*)'|>([^<]*)<)""")
NOT_IN_XML = re.compile("[\x7f-\x9f\ufffe\uffff]")  # JSON escapes the other characters that XML forbids
PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:joyjax="https://github.com/joyjax/joyjax/ns/1/" joyjax:recipe="{}"/>'
    "</rdf:RDF></x:xmpmeta>"
)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts in a picture file: the recipe, as JSON, and `parameters` for other programs."""

    recipe: str
    parameters: str


def save_options(texts: Texts, name: str) -> dict[str, Any]:
    """Return the arguments of `Image.save` that store texts in a file of Pillow's format `name`.

    Raises:
        RequestError: if they are too long for a JPEG file.
    """
    if name == "PNG":
        chunks = PngInfo()
        chunks.add_itxt(CHUNK, texts.recipe)
        chunks.add_text("parameters", texts.parameters)
        return {"pnginfo": chunks}
    recipe = NOT_IN_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", texts.recipe)
    packet = PACKET.format(html.escape(recipe)).encode()
    if name == "TIFF":
        tags = ImageFileDirectory_v2()
        tags[XMP_TAG] = packet
        tags.tagtype[XMP_TAG] = UNDEFINED
        return {"tiffinfo": tags}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[USER_COMMENT] = b"UNICODE\0" + texts.parameters.encode("utf-16-be")
    written = exif.tobytes()
    if name == "JPEG" and max(len(packet), len(written)) > MOST_IN_JPEG:
        raise RequestError(
            f"the recipe takes {max(len(packet), len(written)):,} bytes and a JPEG file holds {MOST_IN_JPEG:,}; "
            "write a PNG file, or leave the recipe out with --no-metadata (Python: metadata=False)"
        )
    return {"xmp": packet, "exif": written}


def read_recipe_text(path: str | os.PathLike) -> str:
    """Return the text of the recipe in a picture file. No pixel is decoded.

    Raises:
        PictureError: if the file is missing or broken.
        RequestError: if it is of no format that joyjax writes, or holds no recipe.
    """
    if not os.path.isfile(path):
        raise PictureError(f"{path} is not a file" if os.path.exists(path) else f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and broken metadata; neither matters here
            with Image.open(path, formats=list(READ)) as image:
                text = image.info.get(CHUNK) if image.format == "PNG" else _in_xmp(image.info.get("xmp"))
    except UnidentifiedImageError:
        raise RequestError(
            f"{path} is not a picture in a format that joyjax writes; a recipe is in the PNG, JPEG, WebP, AVIF and "
            "TIFF files of `joyjax edit`"
        ) from None
    except Exception as error:  # Pillow raises many types for malformed files
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error
    if not isinstance(text, str):
        raise RequestError(
            f"{path} holds no recipe: it was not written by joyjax, was written with --no-metadata, or has been saved "
            "by another program since"
        )
    return text


def _in_xmp(packet: Any) -> str | None:
    """Return the recipe in XMP. The packet is searched, not parsed, so no entity of untrusted XML is expanded."""
    if not isinstance(packet, bytes):
        return None
    found = RECIPE_IN_XMP.search(packet.decode("utf-8", errors="replace"))
    return html.unescape(next(text for text in found.groups() if text is not None)) if found else None
