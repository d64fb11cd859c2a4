"""Recipes: the settings of a picture, stored in its file so that the picture can be reproduced.

A recipe is a JSON object; media/metadata.py stores it in each format of picture files.

    {"recipe": 1, "joyjax": "0.1.0", "jax": "0.10.2", "device": "cpu",
     "model": {"source": "…", "family": "…", "dtype": "…", "linear": "…", "kernels": "…", "fingerprint": "sha256:…"},
     "settings": {"prompt": "…", "steps": 40, …},
     "references": [{"file": "photo.jpg", "digest": "sha256:…", "size": [1024, 768]}], "mask": null}

File names are relative to the picture's folder; sizes are height and width. A missing setting has the default of the
recipe version, so recipes that are older than an option stay readable.

A recipe is untrusted data. Its size, depth and types are checked, nothing in it is run, and the files that it names are
opened only as pictures and used only if their digests match.
"""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from joyjax.convert.source.model import DEMO
from joyjax.errors import RequestError
from joyjax.media.metadata import Texts, read_recipe_text
from joyjax.media.references import Source
from joyjax.option_types import TEXT, JSONCheck, or_null
from joyjax.options import EDIT, REQUIRED
from joyjax.reading import parse_json, quoted
from joyjax.sampling.noise import NOISE_RULE
from joyjax.version import VERSION

RECIPE = 1
LONGEST = 2**20  # characters of a recipe; the longest prompt that a model takes is a hundredth of it
LONGEST_FILE = 4096  # characters of a file's name
IN_HUB_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[^/\\]+)$")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{64}", value) is not None


TEXT_OR_NOT = or_null(TEXT)
OBJECT: JSONCheck = lambda value: isinstance(value, dict), "an object"
DIGEST: JSONCheck = _is_digest, "sha256: and 64 digits"

# Every setting has the name of an option of `joyjax.edit`. The setting `noise` is the rule that generates it.
KEPT = {name: option for name, option in EDIT.items() if option.in_recipe}
SETTINGS: Mapping[str, JSONCheck] = {
    name: or_null(option.type.json) if option.missing is None else option.type.json for name, option in KEPT.items()
}
# Values of the settings that a recipe of version 1 may lack.
SETTING_DEFAULTS: Mapping[str, Any] = {
    name: option.missing for name, option in KEPT.items() if option.missing is not REQUIRED
}
MODEL: Mapping[str, JSONCheck] = {
    "source": TEXT_OR_NOT,
    "family": TEXT,
    "dtype": TEXT,
    "linear": TEXT,
    "kernels": TEXT,
    "fingerprint": DIGEST,
}
MODEL_DEFAULTS: Mapping[str, Any] = {"linear": "exact", "kernels": "xla"}
OF_MODEL = ("family", "dtype", "linear", "kernels")  # settings of a result that a recipe has there
SOURCE: Mapping[str, JSONCheck] = {
    "file": (lambda value: value is None or _is_relative(value), "a file's name from the picture's folder on, or null"),
    "digest": DIGEST,
    "size": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value),
        "height and width",
    ),
}
TOP: Mapping[str, JSONCheck] = {
    "joyjax": TEXT,
    "jax": TEXT,
    "device": TEXT,
    "model": OBJECT,
    "settings": OBJECT,
    "references": (lambda value: isinstance(value, list), "a list"),
    "mask": (lambda value: value is None or isinstance(value, dict), "an object or null"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe. `model` and `settings` have the keys of MODEL and SETTINGS."""

    jax: str
    device: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    references: tuple[Source, ...] = ()
    mask: Source | None = None

    def plain(self, folder: Path) -> dict[str, Any]:
        """Return the JSON object for a picture file in `folder`."""
        return {
            "recipe": RECIPE,
            "joyjax": VERSION,
            "jax": self.jax,
            "device": self.device,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "references": [source.plain(folder) for source in self.references],
            "mask": None if self.mask is None else self.mask.plain(folder),
        }


def make_recipe(
    settings: Mapping[str, Any],
    *,
    fingerprint: str,
    jax: str,
    device: str,
    references: Sequence[Source] = (),
    mask: Source | None = None,
) -> Recipe:
    """Build the recipe of an edit from `Result.settings`, the model's fingerprint, and the kind of device.

    The bundled demo and models of the hub are recorded as such, not by their path on this machine.

    Raises:
        ValueError: unless `settings` has the keys of SETTINGS, "model" and those of OF_MODEL only. Options of some
            families only may be missing.
    """
    known = SETTINGS.keys() | {"model", *OF_MODEL}
    odd = {name for name in settings.keys() ^ known if name in settings or name not in KEPT or KEPT[name].every_family}
    if odd:
        raise ValueError(f"settings and what a recipe holds differ in {', '.join(sorted(odd))}")
    model = {
        "source": _portable(settings["model"]),
        **{name: settings[name] for name in OF_MODEL},
        "fingerprint": fingerprint,
    }
    kept = {name: settings[name] for name in SETTINGS if name in settings}
    return Recipe(jax, device, model, kept, tuple(references), mask)


def recipe_texts(recipe: Recipe, folder: Path) -> Texts:
    """Return the texts to store in a picture file in `folder`.

    Raises:
        RequestError: if the recipe is too long.
    """
    plain = recipe.plain(folder)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    text = re.sub(
        "[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text
    )  # lone surrogates, which UTF-8 cannot encode
    if len(text) > LONGEST:
        raise RequestError(
            f"the recipe has {len(text)} characters, and {LONGEST} at most fit; write the picture without one, with "
            "--no-metadata (Python: metadata=False)"
        )
    return Texts(text, parameters(plain))


def parameters(recipe: Mapping[str, Any]) -> str:
    """Return the main settings in the text format of other programs: both prompts, and a line of names and values.

    Values with a comma, colon, quote or line break in them are quoted as in JSON.
    """
    settings, model = recipe["settings"], recipe["model"]
    scale = settings["guidance_scale"]
    values = {
        "Steps": str(settings["steps"]),
        "Sampler": "Euler flow",
        "CFG scale": ", ".join(f"{each:g}" for each in scale) if isinstance(scale, list | tuple) else f"{scale:g}",
        "Seed": str(settings["seed"]),
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": "joyjax demo" if model["source"] is None else PurePath(model["source"]).name,
        "Version": f"joyjax {recipe['joyjax']}",
    }
    line = ", ".join(f"{name}: {_in_a_list(value)}" for name, value in values.items())
    negative = settings["negative_prompt"].strip()
    text = "\n".join([settings["prompt"], *([f"Negative prompt: {negative}"] if negative else []), line])
    # the format of PNG allows no other control characters in a text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Return the recipe in a picture file, with types checked and defaults filled in.

    It may have unknown settings of a newer version; `edit_arguments` refuses them.

    Raises:
        PictureError: if the file is missing or broken.
        RequestError: if it is of no format that joyjax writes, holds no recipe, or holds one that is damaged or of
            another version.
    """
    text = read_recipe_text(path)
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters; {LONGEST} at most are read")
        recipe = parse_json(text.encode())
        json.dumps(recipe, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{path}: the recipe in it is no JSON object: {error}; give the options instead") from None
    version = recipe.get("recipe")
    if type(version) is not int or version != RECIPE:
        raise RequestError(
            f"{path}: its recipe is of version {quoted(version)}, written by joyjax {quoted(recipe.get('joyjax'))}; "
            f"joyjax {VERSION} reads version {RECIPE}"
        )
    where = f"{path}: the recipe"
    _check(recipe, TOP, where, others=["recipe"])
    for held, defaults in ((recipe["model"], MODEL_DEFAULTS), (recipe["settings"], SETTING_DEFAULTS)):
        for name, value in defaults.items():
            held.setdefault(name, value)
    _check(recipe["model"], MODEL, f"{where}'s model")
    _check(recipe["settings"], SETTINGS, f"{where}'s settings", others=None)
    for number, source in enumerate(recipe["references"], 1):
        _check_source(source, f"{where}'s reference {number}")
    if recipe["mask"] is not None:
        _check_source(recipe["mask"], f"{where}'s mask")
    return recipe


def edit_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `joyjax.edit`, with its prompt, that reproduce the picture.

    Pictures are not among them: see `find_references` and `find_mask` in media/references.py.

    Raises:
        RequestError: for an unknown setting, or noise that cannot be generated.
    """
    settings = recipe["settings"]
    if unknown := sorted(settings.keys() - SETTINGS.keys()):
        raise RequestError(
            f"the recipe, written by joyjax {recipe['joyjax']}, has the setting {quoted(unknown[0])}, which joyjax "
            f"{VERSION} does not know: use a newer version"
        )
    if settings["noise"] == "given":
        raise RequestError(
            "the picture was made from noise that was given to joyjax.edit, which a recipe does not hold: give the "
            "noise again, in Python, with the recipe's settings"
        )
    if settings["noise"] != f"rule {NOISE_RULE}":
        raise RequestError(
            f"the recipe, written by joyjax {recipe['joyjax']}, has the noise {quoted(settings['noise'])}; joyjax "
            f"{VERSION} draws it by rule {NOISE_RULE}: use the version that wrote it"
        )
    scale = settings["guidance_scale"]
    guided = max(scale if isinstance(scale, list) else [scale], default=0) > 1
    # `edit` refuses a negative prompt without effect; so without guidance it was the default
    left_out = {"noise"} if guided else {"noise", "negative_prompt"}
    return {name: value for name, value in settings.items() if name not in left_out}


def _check(found: Any, checks: Mapping[str, JSONCheck], where: str, others: Collection[str] | None = ()) -> None:
    """Raise RequestError unless an object has these keys with valid values, and no keys but `others`; None: any."""
    if not isinstance(found, dict):
        raise RequestError(f"{where} is {quoted(found)}; expected an object")
    for name, (passes, expected) in checks.items():
        if name not in found:
            raise RequestError(f"{where} lacks {name!r}")
        if not passes(found[name]):
            raise RequestError(f"{where} has {name} = {quoted(found[name])}; expected {expected}")
    if others is not None and (odd := sorted(found.keys() - checks.keys() - set(others))):
        raise RequestError(f"{where} has {quoted(odd[0])}, which joyjax {VERSION} does not know")


def _check_source(found: Any, where: str) -> None:
    """Check a picture of a recipe. It may have a URL, which is never fetched unless the user gives it again."""
    _check(found, SOURCE, where, others=["url"])
    url = found.get("url")
    if url is not None and not (isinstance(url, str) and len(url) <= LONGEST_FILE):
        raise RequestError(f"{where} has url = {quoted(url)}; expected a text")


def _is_relative(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_FILE or "\0" in value:
        return False
    return not os.path.isabs(value) and not os.path.splitdrive(value)[0]


def _portable(source: str) -> str | None:
    if Path(source) == DEMO:
        return None
    found = IN_HUB_CACHE.search(source)
    return f"{found['owner']}/{found['name']}@{found['revision']}" if found else source


def _in_a_list(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value
