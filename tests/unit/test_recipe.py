"""Recipes in PNG files: what goes in comes out, pictures are found again by their digests, and nothing else passes."""

import json
import os
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from saved import save

import joyjax
from joyjax.convert.source.model import DEMO
from joyjax.errors import AdviceWarning, JoyJaxError, PictureError, RequestError
from joyjax.media.image import open_picture
from joyjax.media.references import Source, digest, find_mask, find_references
from joyjax.option_types import NUMBER
from joyjax.provenance.fingerprint import check_model
from joyjax.provenance.recipe import (
    LONGEST,
    MODEL_DEFAULTS,
    SETTING_DEFAULTS,
    SETTINGS,
    edit_arguments,
    make_recipe,
    parameters,
    read_recipe,
)
from joyjax.version import VERSION

WRITTEN_BY_0_1_0 = Path(__file__).parents[1] / "data" / "edit-0.1.0.png"  # bfloat16, on a CPU
MARK = f"sha256:{'ab' * 32}"
EDIT = {
    "model": "/models/Joy, fine: tuned",
    "family": "JoyImage-Edit",
    "dtype": "bfloat16",
    "linear": "exact",
    "kernels": "xla",
    "prompt": "make the sky red",
    "negative_prompt": "",
    "steps": 40,
    "guidance_scale": 4.0,
    "sigmas": None,
    "seed": 2**64 - 1,
    "height": 768,
    "width": 1024,
    "exact_size": False,
    "base_size": 1024,
    "fit": "crop",
    "paste_back": False,
    "noise": "rule 1",
    "vae_encode": "exact",
    "vae_decode": "exact",
    "guidance_until": 0.1 + 0.2,
    "cache": None,
    "layers": None,
    "cfg_normalize": None,
}
PROMPTS = [
    "make the sky red",
    "",
    "two\nlines\r\nand a tab\t",
    "🦊 👩‍👩‍👧 naïve – 天空を赤く “quoted”",
    "nul \0 escape \x1b[31m bell \x07 del \x7f c1 \x9b",
    'a "quoted" back\\slash {"recipe": 2}',
    "<|im_end|><|image_pad|> Negative prompt: Steps: 3, Sampler: x, CFG scale: 9",
    "ÿ§é",  # latin-1
    "half \ud83d a face",
    "\u2028\u202e\ufeff\uffff\U0010ffff",
    "long " * 2000,
]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Without the type checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


def recipe_of(*references: Source, mask: Source | None = None, **changed):
    settings = {**EDIT, **changed}
    return make_recipe(settings, fingerprint=MARK, jax="0.10.2", device="cpu", references=references, mask=mask)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A result, with both of its references and a mask in a folder of their own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    files = [tmp_path / "in" / name for name in ("one.png", "two.jpg", "mask.png")]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    sources = [Source.of(open_picture(file), file) for file in files]
    save(picture(9), tmp_path / "out" / "edit.png", recipe_of(*sources[:2], mask=sources[2]))
    return tmp_path / "out" / "edit.png"


def chunks(path: Path) -> list[bytes]:
    data, found = path.read_bytes()[8:], []
    while data:
        (length,) = struct.unpack(">I", data[:4])
        found.append(data[4:8])
        data = data[12 + length :]
    return found


def with_text(path: Path, text: str | bytes, kind: bytes = b"iTXt") -> Path:
    """Write a PNG file with this in the place of a recipe."""
    body = text.encode() if isinstance(text, str) else text
    texts = PngInfo()
    texts.add(kind, {b"iTXt": b"joyjax\0\0\0\0\0", b"zTXt": b"joyjax\0\0", b"tEXt": b"joyjax\0"}[kind] + body)
    picture().save(path, pnginfo=texts)
    return path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_comes_back(tmp_path, prompt):
    path = tmp_path / "edit.png"
    save(picture(), path, recipe_of(prompt=prompt, negative_prompt=prompt))
    found = read_recipe(path)
    assert found["settings"] == {name: {**EDIT, "prompt": prompt, "negative_prompt": prompt}[name] for name in SETTINGS}
    assert found["model"] == {
        "source": EDIT["model"],
        "family": "JoyImage-Edit",
        "dtype": "bfloat16",
        "linear": "exact",
        "kernels": "xla",
        "fingerprint": MARK,
    }
    assert (found["jax"], found["device"], found["references"], found["mask"]) == ("0.10.2", "cpu", [], None)
    with Image.open(path) as image:
        image.load()  # every chunk is read, and their checksums
        assert "parameters" in image.info
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))


def test_lists_come_back(tmp_path):
    values = {"guidance_scale": (4.0, 1.0), "sigmas": (1.0, 1 / 3), "cache": "taylor:0.1"}
    save(picture(), tmp_path / "edit.png", recipe_of(**values))
    found = edit_arguments(read_recipe(tmp_path / "edit.png"))
    assert found["guidance_scale"] == [4.0, 1.0]
    assert found["sigmas"] == [1.0, 1 / 3]
    assert found["cache"] == "taylor:0.1"


def test_the_arguments_of_an_edit(tmp_path):
    save(picture(), tmp_path / "edit.png", recipe_of())
    found = edit_arguments(read_recipe(tmp_path / "edit.png"))
    expected = {
        name: EDIT[name] for name in EDIT if name not in ("model", "family", "dtype", "linear", "kernels", "noise")
    }
    assert found == expected
    assert [type(found[name]) for name in expected] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(("scale", "steered"), [(4.0, True), ((1.0, 1.5), True), (1.0, False), ((1.0, 0.5), False)])
def test_a_negative_prompt_goes_with_guidance(tmp_path, scale, steered):
    save(picture(), tmp_path / "edit.png", recipe_of(guidance_scale=scale))
    assert ("negative_prompt" in edit_arguments(read_recipe(tmp_path / "edit.png"))) is steered


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        ("given", "a recipe does not hold"),
        ("rule 2", "'rule 2'; joyjax .* draws it by rule 1"),
        ("", "has the noise ''"),
    ],
)
def test_noise_that_cannot_be_drawn(tmp_path, noise, says):
    save(picture(), tmp_path / "edit.png", recipe_of(noise=noise))
    with pytest.raises(RequestError, match=says):
        edit_arguments(read_recipe(tmp_path / "edit.png"))


def test_a_setting_of_a_newer_version(tmp_path):
    save(picture(), tmp_path / "edit.png", recipe_of())
    raw = read_recipe(tmp_path / "edit.png")
    raw["settings"]["sharpness"] = 3
    found = read_recipe(with_text(tmp_path / "new.png", json.dumps(raw)))  # `joyjax info` can show it
    with pytest.raises(RequestError, match="'sharpness', which joyjax .* does not know: use a newer version"):
        edit_arguments(found)


def test_settings_must_be_those_of_a_recipe():
    with pytest.raises(ValueError, match="differ in fit$"):
        make_recipe({k: v for k, v in EDIT.items() if k != "fit"}, fingerprint=MARK, jax="1", device="cpu")
    with pytest.raises(ValueError, match="differ in sharpness$"):
        recipe_of(sharpness=3)


def test_no_metadata(tmp_path):
    save(picture(), tmp_path / "edit.png", None)
    assert set(chunks(tmp_path / "edit.png")) == {b"IHDR", b"IDAT", b"IEND"}
    with pytest.raises(RequestError, match="holds no recipe.*--no-metadata"):
        read_recipe(tmp_path / "edit.png")
    profiled = picture()
    profiled.info["icc_profile"] = b"a profile"
    for recipe in (None, recipe_of()):
        save(profiled, tmp_path / "edit.png", recipe)
        assert Image.open(tmp_path / "edit.png").info["icc_profile"] == b"a profile"
    assert chunks(tmp_path / "edit.png") == [b"IHDR", b"iCCP", b"iTXt", b"tEXt", b"IDAT", b"IEND"]


def test_a_recipe_that_is_too_long(tmp_path):
    with pytest.raises(RequestError, match="at most fit; .*--no-metadata"):
        save(picture(), tmp_path / "edit.png", recipe_of(prompt="x" * LONGEST))
    assert list(tmp_path.iterdir()) == []
    save(picture(), tmp_path / "edit.png", recipe_of(prompt="x" * (LONGEST - 5000)))
    assert len(read_recipe(tmp_path / "edit.png")["settings"]["prompt"]) == LONGEST - 5000


def test_where_a_model_came_from():
    demo = recipe_of(model=str(DEMO))
    assert demo.model["source"] is None  # its place on this machine is nobody's business
    hub = "/home/me/.cache/huggingface/hub/models--jdopensource--JoyAI-Image-Edit-Diffusers/snapshots/0f1e2d"
    assert recipe_of(model=hub).model["source"] == "jdopensource/JoyAI-Image-Edit-Diffusers@0f1e2d"
    assert recipe_of(model="models/snapshots/x").model["source"] == "models/snapshots/x"
    assert "Model: joyjax demo" in parameters(demo.plain(Path()))


def test_what_other_programs_read(tmp_path):
    """The form of AUTOMATIC1111's web UI, whose reader takes apart the last line at commas outside of quotes."""
    path = tmp_path / "edit.png"
    save(picture(), path, recipe_of(prompt="make the sky\nred", negative_prompt=" blurred\0 "))
    text = Image.open(path).info["parameters"]
    assert text.splitlines()[:3] == ["make the sky", "red", "Negative prompt: blurred\ufffd"]
    assert text.splitlines()[3:] == [
        "Steps: 40, Sampler: Euler flow, CFG scale: 4, Seed: 18446744073709551615, Size: 1024x768, "
        f'Model: "Joy, fine: tuned", Version: joyjax {VERSION}'
    ]
    save(picture(), path, recipe_of(guidance_scale=(4.0, 2.5)))
    assert 'red\nSteps: 40, Sampler: Euler flow, CFG scale: "4, 2.5", Seed' in Image.open(path).info["parameters"]
    save(picture(), path, recipe_of(prompt="naïve"))
    assert chunks(path)[1:3] == [b"iTXt", b"tEXt"]  # what latin-1 can hold goes where old readers look
    save(picture(), path, recipe_of(prompt="赤"))
    assert chunks(path)[1:3] == [b"iTXt", b"iTXt"]


def test_a_picture_from_a_url(tmp_path):
    image = picture()
    image.location = "https://example.org/a.png"
    save(picture(), tmp_path / "edit.png", recipe_of(Source.of(image)))
    found = read_recipe(tmp_path / "edit.png")
    assert (found["references"][0]["file"], found["references"][0]["url"]) == (None, "https://example.org/a.png")
    with pytest.raises(RequestError, match="came from the URL https://example.org/a.png; name it with --image"):
        find_references(found, tmp_path)
    for wrong in (3, "x" * 5000, [], {}):
        found["references"][0]["url"] = wrong
        with pytest.raises(RequestError, match="has url = .*; expected a text"):
            read_recipe(with_text(tmp_path / "bad.png", json.dumps(found)))
    image.location = "standard input"
    assert "url" not in Source.of(image).plain(tmp_path)


def test_a_digest_is_of_the_picture(tmp_path):
    image = picture(size=(6, 4))
    assert digest(image) == digest(image.copy())
    for name in ("a.png", "a.bmp", "a.tiff", "a.webp"):
        image.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        assert digest(open_picture(tmp_path / name)) == digest(image), name
    with_alpha = image.convert("RGBA")
    assert digest(with_alpha) == digest(image)  # opaque everywhere
    changed = image.copy()
    changed.putpixel((3, 5), tuple(value ^ 1 for value in image.getpixel((3, 5))))
    rotated = image.copy()
    rotated.getexif()[0x0112] = 6
    reshaped = Image.frombytes("RGB", (6, 4), image.tobytes())
    with_alpha.putalpha(Image.new("L", image.size, 254))
    found = {digest(each) for each in (image, changed, rotated, reshaped, with_alpha)}
    assert len(found) == 5
    assert digest(rotated) == digest(image.transpose(Image.Transpose.ROTATE_270))
    grey = Image.new("L", (4, 4), 7)
    assert digest(grey) == digest(grey.convert("RGB"))
    with pytest.raises(PictureError):
        digest(np.zeros((4, 4, 3)))


def test_a_digest_is_the_same_before_and_after_reading(tmp_path):
    """A picture that was opened by Pillow alone is known again when joyjax opens its file."""
    for name, image in {
        "palette.png": picture().quantize(8),
        "grey.png": Image.new("L", (5, 4), 9),
        "one_bit.png": Image.new("1", (5, 4), 1),
        "deep.png": Image.fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000),
        "clear.png": picture().convert("RGBA"),
        "grey_and_clear.png": Image.new("LA", (5, 4), (9, 100)),
    }.items():
        if name == "clear.png":
            image.putalpha(picture(1).getchannel("R"))
        exif = Image.Exif()
        exif[0x0112] = 8
        image.save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            assert digest(opened) == digest(open_picture(tmp_path / name)), name
    picture().save(tmp_path / "a.png")
    with Image.open(os.fsencode(tmp_path / "a.png")) as opened:
        assert Source.of(opened).file == tmp_path / "a.png"


def test_references_are_found(saved):
    found = read_recipe(saved)
    assert [source["file"] for source in found["references"]] == ["../in/one.png", "../in/two.jpg"]
    assert found["references"][0]["size"] == [20, 30]
    folder = saved.parents[1] / "in"
    assert [path.resolve() for path in find_references(found, saved.parent)] == [folder / "one.png", folder / "two.jpg"]
    assert find_mask(found, saved.parent).resolve() == folder / "mask.png"


def test_a_folder_that_moves_takes_its_references_along(saved, tmp_path):
    moved = shutil.copytree(saved.parents[1], tmp_path / "elsewhere" / "here")
    shutil.rmtree(saved.parents[1] / "in")
    found = read_recipe(moved / "out" / "edit.png")
    assert find_references(found, moved / "out")[0].resolve() == moved / "in" / "one.png"
    for file in (moved / "in").iterdir():
        file.rename(moved / "out" / file.name)  # beside the result
    assert find_references(found, moved / "out") == [moved / "out" / "one.png", moved / "out" / "two.jpg"]
    assert find_mask(found, moved / "out") == moved / "out" / "mask.png"


def test_a_linked_folder(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    picture().save(tmp_path / "one.png")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "deep", target_is_directory=True)
    source = Source.of(picture(), tmp_path / "one.png")
    save(picture(), tmp_path / "link" / "edit.png", recipe_of(source))
    found = read_recipe(tmp_path / "link" / "edit.png")
    assert found["references"][0]["file"] == "../../one.png"
    assert find_references(found, tmp_path / "link")[0].resolve() == tmp_path / "one.png"


def test_from_the_folder_of_the_result(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    save(picture(), Path("again.png"), recipe_of(Source.of(picture(0), "../in/one.png")))
    found = read_recipe("again.png")
    assert found["references"][0]["file"] == "../in/one.png"
    assert find_references(found, Path())[0].resolve() == saved.parents[1] / "in" / "one.png"


@pytest.mark.skipif(sys.platform != "linux", reason="a file's name that is no text")
def test_a_name_that_is_no_text(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.png")
    picture().save(file)
    save(picture(), tmp_path / "edit.png", recipe_of(Source.of(picture(), file)))
    assert find_references(read_recipe(tmp_path / "edit.png"), tmp_path) == [file]


def test_references_that_changed_or_are_gone(saved):
    found, folder = read_recipe(saved), saved.parents[1] / "in"
    one = folder / "one.png"
    picture(7).save(one)
    begin = digest(picture(7))[:15]
    with pytest.raises(RequestError, match=f"reference 1, .*one.png, has changed: its digest is {begin}… and was sha2"):
        find_references(found, saved.parent)
    picture(0).save(saved.parent / "one.png")  # one beside the result is the right one
    assert find_references(found, saved.parent)[0] == saved.parent / "one.png"
    (saved.parent / "one.png").unlink()
    one.write_text("no picture")
    with pytest.raises(RequestError, match="reference 1 can no longer be read .*one.png cannot be read as a picture"):
        find_references(found, saved.parent)
    one.unlink()
    with pytest.raises(RequestError, match=r"reference 1, \.\./in/one.png, is missing: .*; name .* with --image"):
        find_references(found, saved.parent)
    (folder / "mask.png").unlink()
    with pytest.raises(RequestError, match=r"the mask, \.\./in/mask.png, is missing: .* with --mask"):
        find_mask(found, saved.parent)


def test_a_reference_that_was_no_file(tmp_path):
    save(picture(), tmp_path / "edit.png", recipe_of(Source.of(picture())))
    found = read_recipe(tmp_path / "edit.png")
    assert found["references"][0]["file"] is None
    with pytest.raises(RequestError, match="the reference came from no file; name it with --image"):
        find_references(found, tmp_path)
    assert find_mask(found, tmp_path) is None


@pytest.mark.parametrize("file", ["/etc/passwd", "", "a\0b", "x" * 5000, 3, ["a.png"], False])
def test_files_that_no_recipe_names(saved, tmp_path, file):
    raw = read_recipe(saved)
    raw["references"][0]["file"] = file
    with pytest.raises(RequestError, match="reference 1 has file = .*; expected a file's name"):
        read_recipe(with_text(tmp_path / "bad.png", json.dumps(raw)))


def test_files_are_read_as_pictures_only(saved, tmp_path):
    raw = read_recipe(saved)
    os.mkfifo(saved.parent / "pipe")  # reading it would never end
    for file in ("pipe", "..", ".", "../out"):
        raw["references"][0]["file"] = file
        found = read_recipe(with_text(tmp_path / "bad.png", json.dumps(raw)))
        with pytest.raises(RequestError, match="is missing"):
            find_references(found, saved.parent)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("recipe", 2, f"of version 2, written by joyjax '{VERSION}'; joyjax {VERSION} reads version 1"),
        ("recipe", True, "of version True"),
        ("recipe", None, "of version None"),
        ("recipe", "1", "of version '1'"),
        ("joyjax", 1, "has joyjax = 1; expected a text"),
        ("device", None, "has device = None"),
        ("more", 1, f"has 'more', which joyjax {VERSION} does not know"),
        ("model", "joy", "has model = 'joy'; expected an object"),
        ("model/source", 3, "model has source = 3; expected a text or null"),
        ("model/fingerprint", "sha256:12", "model has fingerprint = 'sha256:12'; expected sha256: and 64 digits"),
        ("model/fingerprint", MARK + "\n", "expected sha256: and 64 digits"),
        ("model/code", "import os", "model has 'code'"),
        ("settings", [], r"has settings = \[\]; expected an object"),
        ("settings/prompt", ["a"], r"settings has prompt = \['a'\]; expected a text"),
        ("settings/prompt", "\x1b[31m" * 999, None),
        ("settings/steps", 4.0, "steps = 4.0; expected a whole number"),
        ("settings/steps", True, "steps = True; expected a whole number"),
        ("settings/steps", "40", "steps = '40'"),
        ("settings/seed", 10**4000, None),  # `edit` refuses it
        ("settings/guidance_scale", "4", "expected a number or a list of numbers"),
        ("settings/guidance_scale", [4, None], "expected a number or a list of numbers"),
        ("settings/guidance_scale", [[4]], "expected a number or a list of numbers"),
        ("settings/guidance_scale", [True], "expected a number or a list of numbers"),
        ("settings/sigmas", 0.5, "expected a list of numbers or null"),
        ("settings/guidance_until", None, "expected a number"),
        ("settings/exact_size", 1, "expected true or false"),
        ("settings/paste_back", None, "expected true or false"),
        ("settings/cache", 0.1, "expected a text or null"),
        ("settings/noise", 1, "expected a text"),
        ("references", {}, "has references = {}; expected a list"),
        ("references", ["photo.jpg"], "reference 1 is 'photo.jpg'; expected an object"),
        ("references/0/digest", "md5:0", "reference 1 has digest = 'md5:0'"),
        ("references/0/size", [1], r"reference 1 has size = \[1\]; expected height and width"),
        ("references/0/size", [0, 1.5], "expected height and width"),
        ("references/0/link", "http://", "reference 1 has 'link'"),
        ("mask", 0, "has mask = 0; expected an object or null"),
        ("mask", False, "has mask = False; expected an object or null"),
    ],
)
def test_every_type_is_checked(saved, tmp_path, path, value, says):
    raw = json.loads(Image.open(saved).info["joyjax"])
    *outer, last = (int(part) if part.isdecimal() else part for part in path.split("/"))
    inner = raw
    for part in outer:
        inner = inner[part]
    inner[last] = value
    file = with_text(tmp_path / "bad.png", json.dumps(raw))
    if says is None:
        assert read_recipe(file) == raw
        return
    with pytest.raises(RequestError, match=says) as caught:
        read_recipe(file)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_everything_must_be_there(saved, tmp_path):
    raw = json.loads(Image.open(saved).info["joyjax"])
    for path in [(key,) for key in raw] + [(key, inner) for key in ("model", "settings") for inner in raw[key]]:
        less = json.loads(json.dumps(raw))
        inner = less
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        file = with_text(tmp_path / "less.png", json.dumps(less))
        if path[-1] in {**SETTING_DEFAULTS, **MODEL_DEFAULTS}:
            continue
        with pytest.raises(RequestError, match="lacks|of version None"):
            read_recipe(file)


def test_a_setting_that_is_missing_means_its_default(saved, tmp_path):
    """A recipe of the first version that joyjax wrote before an option existed."""
    raw = json.loads(Image.open(saved).info["joyjax"])
    for name in SETTING_DEFAULTS:
        del raw["settings"][name]
    del raw["model"]["linear"], raw["model"]["kernels"]
    found = read_recipe(with_text(tmp_path / "less.png", json.dumps(raw)))
    assert found["settings"].keys() == SETTINGS.keys()
    assert {name: found["settings"][name] for name in SETTING_DEFAULTS} == dict(SETTING_DEFAULTS)
    assert (found["model"]["linear"], found["model"]["kernels"]) == ("exact", "xla")


def test_defaults_are_those_of_edit():
    """A recipe without a setting is made again as `edit` makes a picture without that argument."""
    import inspect

    arguments = inspect.signature(joyjax.edit).parameters
    for name, value in SETTING_DEFAULTS.items():
        assert arguments[name].default == value, name
        assert SETTINGS[name][0](value), name


def test_a_new_option_leaves_older_pictures_readable(tmp_path, monkeypatch):
    """What joyjax 0.1.0 wrote, read by a version with one more option."""
    monkeypatch.setattr("joyjax.provenance.recipe.SETTINGS", {**SETTINGS, "sharpness": NUMBER})
    monkeypatch.setattr("joyjax.provenance.recipe.SETTING_DEFAULTS", {**SETTING_DEFAULTS, "sharpness": 0.5})
    found = read_recipe(WRITTEN_BY_0_1_0)
    assert edit_arguments(found)["sharpness"] == 0.5
    assert found["joyjax"] == "0.1.0"


def test_a_picture_of_0_1_0_is_made_again(tmp_path):
    """Its pixels too, as far as bfloat16 goes: 0.1.0 rounded more often, and its picture is off float32 by 5 of 255."""
    recipe = read_recipe(WRITTEN_BY_0_1_0)
    folder = Path(__file__).parents[2] / "examples"
    pictures = [open_picture(path) for path in find_references(recipe, folder)]

    def made(dtype: str) -> np.ndarray:
        pipeline = joyjax.load(dtype=dtype)
        check_model(recipe, Path(pipeline.source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)
            return np.asarray(joyjax.edit(pipeline, pictures, **edit_arguments(recipe)).image, np.int16)

    def error(picture: np.ndarray) -> float:
        return float(np.sqrt(np.mean((picture - exact) ** 2)))

    before, again, exact = np.asarray(open_picture(WRITTEN_BY_0_1_0), np.int16), made("bfloat16"), made("float32")
    assert np.abs(again - before).max() <= 5
    assert np.abs(exact - before).max() <= 5
    assert error(again) <= 1.1 * error(before)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON object"),
        ("make the sky red", "no JSON object"),
        ("[1]", "a json list"),
        ('{"recipe": 1', "no JSON object"),
        ('{"recipe": 1, "recipe": 1}', "'recipe' is there twice"),
        ('{"recipe": NaN}', "no JSON object"),
        ('{"recipe": 1e999}', "no JSON object"),
        ('{"recipe": 1' + "0" * 5000 + "}", "no JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ('{"recipe": "' + "x" * LONGEST + '"}', "characters; 1048576 at most are read"),
    ],
)
def test_broken_json(tmp_path, text, says):
    with pytest.raises(RequestError, match=says):
        read_recipe(with_text(tmp_path / "bad.png", text))


def test_chunks_of_other_kinds(saved, tmp_path):
    text = Image.open(saved).info["joyjax"].encode()
    assert read_recipe(with_text(tmp_path / "a.png", text, b"tEXt"))["settings"]["prompt"] == "make the sky red"
    assert read_recipe(with_text(tmp_path / "b.png", zlib.compress(text), b"zTXt"))["recipe"] == 1
    says = r"bomb.png (holds no recipe|cannot be read as a picture: Decompressed data)"
    bomb = zlib.compress(b" " * 2**26)
    with pytest.raises(JoyJaxError, match=says):
        read_recipe(with_text(tmp_path / "bomb.png", bomb, b"zTXt"))
    texts = PngInfo()
    texts.add_itxt("joyjax", " " * 2**26, zip=True)
    picture().save(tmp_path / "bomb.png", pnginfo=texts)
    with pytest.raises(JoyJaxError, match=says):
        read_recipe(tmp_path / "bomb.png")
    with pytest.raises(RequestError, match="holds no recipe"):
        read_recipe(with_text(tmp_path / "c.png", b"\xff\xfe"))  # no UTF-8


def test_files_that_are_no_png(saved, tmp_path):
    with pytest.raises(PictureError, match="none.png does not exist"):
        read_recipe(tmp_path / "none.png")
    with pytest.raises(PictureError, match="is not a file"):
        read_recipe(tmp_path)
    with pytest.raises(RequestError, match="two.jpg holds no recipe"):
        read_recipe(saved.parents[1] / "in" / "two.jpg")
    (tmp_path / "half.png").write_bytes(saved.read_bytes()[:100])
    (tmp_path / "empty.png").touch()
    for name in ("half.png", "empty.png"):
        with pytest.raises(JoyJaxError, match=f"{name} (is not a picture|holds no recipe|cannot be read as a)"):
            read_recipe(tmp_path / name)
    pixels = saved.read_bytes()
    for place in range(0, len(pixels), 7):  # a flipped bit anywhere: refused, or as it was
        (tmp_path / "flipped.png").write_bytes(pixels[:place] + bytes([pixels[place] ^ 4]) + pixels[place + 1 :])
        try:
            assert read_recipe(tmp_path / "flipped.png") == read_recipe(saved)
        except JoyJaxError:
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "seed": 5, "guidance_scale": 2.0, "guidance_until": 0.5, "negative_prompt": "blue"},
        {"sigmas": [1.0, 0.6, 0.3], "guidance_scale": [2.0, 1.5, 1.0]},
        {"fit": "pad", "paste_back": True},
    ],
)
def test_the_demo_makes_a_picture_again(tmp_path, options):
    """Everything that `edit` reports of itself is what a recipe holds, and the same pixels come of it."""
    pipeline = joyjax.load(dtype="float32")
    file = tmp_path / "shapes.png"
    Image.open(Path(__file__).parents[2] / "examples" / "shapes.png").convert("RGB").resize((128, 112)).save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)
        first = joyjax.edit(pipeline, open_picture(file), "make the red circle blue", **options)
        first.save(tmp_path / "edit.png")
        recipe = read_recipe(tmp_path / "edit.png")
        check_model(recipe, Path(pipeline.source))
        pictures = [open_picture(path) for path in find_references(recipe, tmp_path)]
        again = joyjax.edit(pipeline, pictures, **edit_arguments(recipe))
    assert again.settings == first.settings
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(open_picture(tmp_path / "edit.png")))
