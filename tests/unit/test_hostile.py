"""Hostile and broken checkpoints: always one CheckpointError that names file and tensor, in time, never a crash."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import joyjax
from joyjax.convert.conversion import convert_checkpoint
from joyjax.convert.safetensors import Tensors
from joyjax.errors import CheckpointError
from joyjax.families.joyimage import EDIT

pytestmark = pytest.mark.parity  # the checkpoint is the reference's

Break = Callable[[Path], object]
INDEX, MANIFEST = "model_index.json", "joyjax.json"
TRANSFORMER, ENCODER, VAE = (f"{name}/config.json" for name in ("transformer", "text_encoder", "vae"))
WEIGHTS, IMG_IN = "transformer/diffusion_pytorch_model.safetensors", "img_in.weight"
TOKENIZER, WORDS = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
PROCESSOR, SCHEDULER = "processor/preprocessor_config.json", "scheduler/scheduler_config.json"
PART, BIAS = "transformer/part-00000", ("components", "vae", "parameters", "quant.bias")
MISSING = object()
LONG = "1" + "0" * 5000  # a number of more digits than Python reads
ESCAPE = "\x1b]0;owned\x07"  # sets a terminal's title
LIMIT = 300  # seconds; of computing, a twentieth of it


def remove(name: str) -> Break:
    def apply(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return apply


def write(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name: str, share: float = 0.5) -> Break:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return apply


def change(name: str, *path: str, to: object) -> Break:
    """Set one value of a json file, or take it out."""

    def apply(folder: Path) -> None:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        place = raw
        for key in path[:-1]:
            place = place[key]
        if to is MISSING:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        (folder / name).write_text(json.dumps(raw), encoding="utf-8")

    return apply


def replace(name: str, old: str, to: str) -> Break:
    """Change the text of a json file where `json` would not write what is wanted."""

    def apply(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, to, 1), encoding="utf-8")

    return apply


def rename(name: str, to: str) -> Break:
    return lambda folder: (folder / name).rename(folder / to)


def large(name: str, size: int = 2**40) -> Break:
    """Make a file large; the disk holds nothing of it."""
    return lambda folder: os.truncate(folder / name, size)


def link(name: str, to: str) -> Break:
    """Put a link in place of a file or folder, which goes beside the model."""

    def apply(folder: Path) -> None:
        if (folder / name).exists():
            (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(to)

    return apply


def special(name: str, make: Callable[[Path], object]) -> Break:
    """Put something that is no regular file in place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def listen(path: Path) -> None:
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


def deep(folder: Path) -> None:
    place = folder
    for _ in range(50):
        place = place / "a"
        place.mkdir()


def header_text(edit: Callable[[str], str | bytes]) -> Break:
    """Change the header of the transformer's file as text; the data stay."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = edit(data[8:end].decode())
        written = text if isinstance(text, bytes) else text.encode()
        (folder / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + data[end:])

    return apply


def header(edit: Callable[[dict], object]) -> Break:
    """Change the header of the transformer's file as an object."""

    def changed(text: str) -> str:
        raw = json.loads(text)
        edit(raw)
        return json.dumps(raw)

    return header_text(changed)


def entry(**changes: object) -> Break:
    """Change what the header says of one tensor."""

    def edit(raw: dict) -> None:
        raw[IMG_IN] = {key: value for key, value in {**raw[IMG_IN], **changes}.items() if value is not MISSING}

    return header(edit)


def moved(first: int, last: int) -> Break:
    """Move the beginning and the end of one tensor by some bytes."""

    def edit(raw: dict) -> None:
        start, stop = raw[IMG_IN]["data_offsets"]
        raw[IMG_IN]["data_offsets"] = [start + first, stop + last]

    return header(edit)


def renamed(name: str) -> Break:
    """Give one tensor another name."""
    return header(lambda raw: raw.update({name: raw.pop(IMG_IN)}))


def numbers(kind: str, value: float, folder: str = "transformer", tensor: str = IMG_IN) -> Break:
    """Put one number into a tensor of some dtype."""

    def apply(model: Path) -> None:
        (file,) = (model / folder).glob("*.safetensors")
        held = load_file(file)
        held[tensor] = held[tensor].astype(kind)
        held[tensor].flat[-1] = value
        save_file(held, file)

    return apply


def both(*breaks: Break) -> Break:
    return lambda folder: [apply(folder) for apply in breaks]


def tensors(edit: Callable[[dict[str, np.ndarray]], object]) -> Break:
    """Change the transformer's tensors."""

    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS)

    return apply


def index_to(where: str) -> Break:
    """Put an index in place of the transformer's file; it has one of the tensors in the file `where`."""

    def apply(folder: Path) -> None:
        shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
        (folder / WEIGHTS).rename(folder / "transformer" / shard)
        held = dict.fromkeys(load_file(folder / "transformer" / shard), shard)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {**held, IMG_IN: where}}))

    return apply


def index_of(text: str) -> Break:
    """Put an index of this text in place of the transformer's file."""
    return both(remove(WEIGHTS), write(f"{WEIGHTS}.index.json", text.encode()))


def tokenizer(**changes: object) -> Break:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / TOKENIZER).read_text())
        (folder / TOKENIZER).write_text(json.dumps({**raw, **changes}))

    return apply


def pattern(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def piece(edit: Callable[[dict], object]) -> Break:
    """Change what a manifest says of one parameter."""

    def apply(folder: Path) -> None:
        raw = json.loads((folder / MANIFEST).read_text())
        edit(raw["components"]["vae"]["parameters"]["quant.bias"])
        (folder / MANIFEST).write_text(json.dumps(raw))

    return apply


DIFFUSERS: dict[str, tuple[Break, str]] = {
    # the index of the model
    "no index": (remove(INDEX), f"{INDEX} is missing"),
    "index cut off": (truncate(INDEX), f"{INDEX} is not valid json"),
    "index of bytes": (write(INDEX, b"\xff\xfe\x00"), f"{INDEX} is not valid json"),
    "index too deep": (write(INDEX, b"[" * 100_000), f"{INDEX} is not valid json"),
    "index a list": (write(INDEX, b"[]"), f"{INDEX} holds a json list"),
    "index empty": (write(INDEX, b"{}"), f"{INDEX}: _class_name is None"),
    "family": (change(INDEX, "_class_name", to="FluxPipeline"), f"{INDEX}: .*'FluxPipeline'; .* JoyImageEditPipeline"),
    "family a list": (change(INDEX, "_class_name", to=["a"]), rf"{INDEX}: .*\['a'\]"),
    "network of another class": (change(INDEX, "vae", to=["diffusers", "AutoencoderKL"]), f"{INDEX}: vae is 'Autoe"),
    "network left out": (change(INDEX, "transformer", to=[None, None]), f"{INDEX}: transformer is None"),
    "network missing": (change(INDEX, "transformer", to=MISSING), f"{INDEX}: transformer is None"),
    "network a list": (change(INDEX, "vae", to=["diffusers", ["AutoencoderKLWan"]]), f"{INDEX}: vae is "),
    "other prompt length": (change(INDEX, "text_token_max_length", to=1024), f"{INDEX}: text_token_max_length is 1024"),
    # the networks' configurations
    "no config": (remove(VAE), f"{VAE} is missing"),
    "config a string": (write(VAE, b'"config"'), f"{VAE} holds a json str"),
    "config value": (change(TRANSFORMER, "rope_type", to="xpos"), f"{TRANSFORMER}: rope_type is 'xpos'"),
    "config type": (change(TRANSFORMER, "num_layers", to="3"), f"{TRANSFORMER}: num_layers is '3'"),
    "config key": (change(VAE, "tiling", to=True), f"{VAE}: tiling = True"),
    "config infinite": (
        change(TRANSFORMER, "theta", to=float("inf")),
        f"{TRANSFORMER} is not valid json: 'theta' is inf",
    ),
    "config section": (change(ENCODER, "text_config", to=MISSING), f"{ENCODER}: text_config is None"),
    "more layers": (change(TRANSFORMER, "num_layers", to=4), r"transformer: .*\n.*double_blocks\.3\..* is missing"),
    "other channels": (change(TRANSFORMER, "in_channels", to=12), f"{TRANSFORMER}: out_channels 16 .* in_channels 12"),
    "other text": (change(TRANSFORMER, "text_dim", to=96), f"{TRANSFORMER}: text_dim is 96, but .* hidden_size is 64"),
    "other picture token": (
        change(ENCODER, "image_token_id", to=7),
        rf"{ENCODER}: image_token_id is 7, .*<\|image_pad",
    ),
    # tokenizer, processor, schedule
    "no tokenizer": (remove("tokenizer"), "tokenizer has no vocab.json"),
    "tokenizer cut off": (truncate(TOKENIZER), f"{TOKENIZER} is not valid json"),
    "tokenizer empty": (write(TOKENIZER, b""), f"{TOKENIZER} is not valid json"),
    "tokenizer settings": (write(WORDS, b"{"), f"{WORDS} is not valid json"),
    "merges missing": (change(TOKENIZER, "model", "merges", to="all"), "tokenizer in .*tokenizer cannot be read"),
    "no control tokens": (
        both(change(TOKENIZER, "added_tokens", to=[]), change(WORDS, "extra_special_tokens", to=[])),
        r"/tokenizer: the tokenizer has no <\|im_start\|>",
    ),
    "more tokens": (
        change(WORDS, "extra_special_tokens", to=[f"<|{n}|>" for n in range(600)]),
        "/tokenizer has .* tokens; the text encoder 512",
    ),
    "no processor": (remove("processor"), f"{PROCESSOR} is missing"),
    "processor value": (change(PROCESSOR, "resample", to=2), f"{PROCESSOR}: resample is 2"),
    "processor type": (change(PROCESSOR, "image_mean", to=0.5), f"{PROCESSOR}: image_mean is 0.5"),
    "other patches": (change(PROCESSOR, "patch_size", to=14), f"{PROCESSOR}: patch_size is 14, .* is 16"),
    "other merging": (change(PROCESSOR, "merge_size", to=4), f"{PROCESSOR}: merge_size is 4, .* is 2"),
    "no schedule": (remove(SCHEDULER), f"{SCHEDULER} is missing"),
    "schedule value": (change(SCHEDULER, "use_karras_sigmas", to=True), f"{SCHEDULER}: use_karras_sigmas is True"),
    "schedule type": (change(SCHEDULER, "shift", to=None), f"{SCHEDULER}: shift is None"),
    # weights
    "no weights": (remove(WEIGHTS), "transformer holds no weights"),
    "no folder": (remove("text_encoder"), f"{ENCODER} is missing"),
    "weights cut off": (truncate(WEIGHTS, 0.99), f"{WEIGHTS} is not a readable"),
    "header cut off": (truncate(WEIGHTS, 0.001), f"{WEIGHTS} is not a readable"),
    "weights empty": (write(WEIGHTS, b""), f"{WEIGHTS} is not a readable"),
    "weights of noise": (write(WEIGHTS, bytes(range(256)) * 64), f"{WEIGHTS} is not a readable"),
    "huge header": (write(WEIGHTS, b"\xff" * 7 + b"\x7f{}"), f"{WEIGHTS} is not a readable"),
    "pickled": (rename(WEIGHTS, "transformer/weights.bin"), "transformer holds pickled weights only"),
    "variant": (rename(WEIGHTS, "transformer/a.fp16.safetensors"), "transformer holds no .*, only a.fp16.safetensors"),
    "tensor missing": (tensors(lambda held: held.pop(IMG_IN)), rf"transformer: .*\n.*{IMG_IN} .* is missing"),
    "tensor left over": (
        tensors(lambda held: held.update(lora=np.zeros(3, np.float32))),
        r"transformer: .*\n.*lora \[3\] is not part",
    ),
    "tensor of another shape": (
        tensors(lambda held: held.update({IMG_IN: held[IMG_IN][:, :, :, :1].copy()})),
        rf"transformer: .*\n.*{IMG_IN} has shape \[64, 16, 1, 1, 2\], expected \[64, 16, 1, 2, 2\]",
    ),
    "tensor of integers": (
        tensors(lambda held: held.update({IMG_IN: held[IMG_IN].astype(np.int8)})),
        rf"transformer: .*\n.*{IMG_IN} is int8",
    ),
    "index to a missing file": (index_to("two.safetensors"), "two.safetensors is missing"),
    "index to another folder": (index_to("../vae/v.safetensors"), "index.json: '../vae/.* is not the name"),
    "index to no weights": (index_to("/etc/passwd"), "index.json: '/etc/passwd' is not the name"),
    "index and file": (write(f"{WEIGHTS}.index.json", b"{}"), "transformer holds .* and .*; which"),
}
HOSTILE: dict[str, tuple[Break, str]] = {
    # json, whatever it is of
    "json large": (large(VAE), f"{VAE} has 1099511627776 bytes"),
    "json of nulls": (large(VAE, 2**16), f"{VAE} is not valid json"),
    "json deep": (write(VAE, b'{"a":' * 200 + b"0" + b"}" * 200), f"{VAE} is not valid json: it is nested too deeply"),
    "json deeper": (write(VAE, b'{"a":' * 100_000), f"{VAE} is not valid json"),
    "json twice": (replace(VAE, '"z_dim"', '"z_dim": 16, "z_dim"'), f"{VAE} is not valid json: 'z_dim' is there twice"),
    "json with a mark": (replace(VAE, "{", "\ufeff{"), f"{VAE} is not valid json"),
    "json in Latin": (write(VAE, '{"é": 1}'.encode("latin-1")), f"{VAE} is not valid json"),
    "json of NaN": (write(VAE, b"NaN"), f"{VAE} holds a json float"),
    "long number": (replace(VAE, '"z_dim": 16', f'"z_dim": {LONG}'), f"{VAE} is not valid json: .*digits"),
    # configurations
    "config of other values": (change(VAE, "latents_mean", to=[float("nan")] * 16), f"{VAE} .*: 'latents_mean' is nan"),
    "config beyond float32": (replace(VAE, '"dropout": 0.0', '"dropout": 1e999'), f"{VAE} .*: 'dropout' is inf"),
    "config endless": (change(TRANSFORMER, "num_layers", to=10**9), f"{TRANSFORMER}: num_layers is 10+; .* 200 at"),
    "config of many numbers": (change(VAE, "dim_mult", to=[1] * 10**6), f"{VAE}: dim_mult is .* 16 values at most"),
    "config of large numbers": (
        change(TRANSFORMER, "theta", to=10**400),
        f"{TRANSFORMER}: theta is 10+; expected float",
    ),
    "config of wide numbers": (
        change(TRANSFORMER, "mlp_width_ratio", to=1e38),
        f"{TRANSFORMER}: mlp_width_ratio is 1e",
    ),
    "config of long names": (change(VAE, "a" * 10**6, to=[0] * 10**6), f"{VAE}: a{{200}} = .* is not known"),
    "config of wrong kinds": (change(VAE, "latents_std", to={"a": 1}), f"{VAE}: latents_std is "),
    "section a number": (change(ENCODER, "vision_config", to=3), f"{ENCODER}: vision_config"),
    "section endless": (
        change(ENCODER, "vision_config", "depth", to=2**30),
        "vision_config: depth is 1073741824; .* 200 at",
    ),
    "wide heads": (change(ENCODER, "text_config", "head_dim", to=2**30), "text_config: head_dim is 1073741824"),
    "wide table": (change(ENCODER, "text_config", "vocab_size", to=2**40), "text_config: vocab_size is 1099511627776"),
    "processor of no number": (
        change(PROCESSOR, "image_std", to=[0.5, 0.5, float("nan")]),
        f"{PROCESSOR} is not valid json: 'image_std' is nan",
    ),
    "processor of a huge picture": (
        both(change(PROCESSOR, "size", "shortest_edge", to=2**30), change(PROCESSOR, "size", "longest_edge", to=2**30)),
        f"{PROCESSOR}: min_pixels is 1073741824",
    ),
    "schedule of no number": (change(SCHEDULER, "shift", to=-float("inf")), f"{SCHEDULER} .*: 'shift' is -inf"),
    "setting of no number": (write(MANIFEST, b'{"guidance_scale": NaN}'), f"{MANIFEST} .*: 'guidance_scale' is nan"),
    "setting too large": (
        write(MANIFEST, b'{"guidance_scale": 1%b}' % (b"0" * 400)),
        f"{MANIFEST}: guidance_scale is 10",
    ),
    "size too large": (write(MANIFEST, b'{"base_size": 16%b}' % (b"0" * 400)), f"{MANIFEST}: base_size is 160"),
    # files that are none, and links
    "pipe": (special(VAE, os.mkfifo), f"{VAE} cannot be read: not a regular file"),
    "pipe of weights": (special(WEIGHTS, os.mkfifo), f"{WEIGHTS} cannot be read: not a regular file"),
    "pipe beside": (special("README.md", os.mkfifo), "README.md cannot be read: not a regular file"),
    "socket": (special(WORDS, listen), f"{WORDS} cannot be read: not a regular file"),
    "folder for a configuration": (special(VAE, Path.mkdir), f"{VAE} cannot be read: not a regular file"),
    "folder for weights": (special(WEIGHTS, Path.mkdir), f"{WEIGHTS} is not a readable .*: not a regular file"),
    "folder for a tokenizer": (special(TOKENIZER, Path.mkdir), f"{TOKENIZER} cannot be read: not a regular file"),
    "file for a folder": (both(remove("vae"), write("vae", b"")), "vae/config.json cannot be read"),
    "link of a configuration": (link(VAE, "/etc/passwd"), f"{VAE} is a link to /etc/passwd, outside"),
    "link of weights": (link(WEIGHTS, "../../elsewhere"), f"{WEIGHTS} is a link to .*elsewhere, outside"),
    "link of a folder": (link("text_encoder", "../elsewhere"), "text_encoder is a link to .*elsewhere, outside"),
    "link of a tokenizer": (link("tokenizer", "../elsewhere"), "tokenizer is a link to .*elsewhere, outside"),
    "link of a device": (link(TOKENIZER, "/dev/zero"), f"{TOKENIZER} is a link to /dev/zero, outside"),
    "link to nothing": (link(VAE, "nothing.json"), f"{VAE} cannot be read: .*No such file"),
    "link to itself": (
        link(WEIGHTS, Path(WEIGHTS).name),
        f"{WEIGHTS} cannot be read: .*[lL]oop|{WEIGHTS} cannot be read",
    ),
    "link to the folder above": (link("vae/more", "../.."), "vae/more is a link to ../.., outside"),
    "deep folders": (deep, "/a lies more than 32 folders deep"),
    # the header of a safetensors file, its length and its text
    "header longer than the file": (
        write(WEIGHTS, (99).to_bytes(8, "little") + b"{}"),
        f"{WEIGHTS} .* header of 99;",
    ),
    "header of length -1": (write(WEIGHTS, b"\xff" * 8 + b"{}"), f"{WEIGHTS} .* header of 18446744073709551615"),
    "header of a terabyte": (
        both(write(WEIGHTS, (2**39).to_bytes(8, "little") + b"{}"), large(WEIGHTS)),
        f"{WEIGHTS} .* too few for a header of 549755813888",
    ),
    "header of no length": (write(WEIGHTS, bytes(8)), f"{WEIGHTS} .* its header is not a json object"),
    "header of bytes": (header_text(lambda text: b"\xff\xfe\x00"), f"{WEIGHTS} .* its header is not a json object"),
    "header a list": (header_text(lambda text: "[]"), f"{WEIGHTS} .* its header is not a json object: a json list"),
    "header deep": (header_text(lambda text: '{"a":' * 10**5), f"{WEIGHTS} .* its header is not a json object"),
    "header less deep": (entry(shape=json.loads("[" * 500 + "]" * 500)), f"{WEIGHTS} .* is nested too deeply"),
    "header empty": (header_text(lambda text: "{}"), f"{WEIGHTS} .* its tensors take 0 bytes"),
    "header of a long number": (
        header_text(lambda text: text.replace('"shape":[', f'"shape":[{LONG},', 1)),
        f"{WEIGHTS} .* its header is not a json object: .*digits",
    ),
    "tensor there twice": (
        header_text(lambda text: text.rstrip()[:-1] + ',"a":{},"a":{}}'),
        f"{WEIGHTS} .* 'a' is there twice",
    ),
    "metadata a list": (
        header(lambda raw: raw.update(__metadata__=[])),
        f"{WEIGHTS} .* its __metadata__ is a json list",
    ),
    "metadata null": (
        header(lambda raw: raw.update(__metadata__=None)),
        f"{WEIGHTS} .* its __metadata__ is a json None",
    ),
    "more data": (lambda folder: (folder / WEIGHTS).open("ab").write(b"more"), f"{WEIGHTS} .* its tensors take"),
    "a terabyte more": (large(WEIGHTS), f"{WEIGHTS} .* its tensors take .* it holds 10995"),
    # what a header says of a tensor
    "entry null": (
        header(lambda raw: raw.update({IMG_IN: None})),
        f"{WEIGHTS} .* tensor {IMG_IN} is not described by dtype",
    ),
    "entry a list": (
        header(lambda raw: raw.update({IMG_IN: [1]})),
        f"{WEIGHTS} .* tensor {IMG_IN} is not described by dtype",
    ),
    "entry without dtype": (entry(dtype=MISSING), f"{WEIGHTS} .* tensor {IMG_IN} is not described by dtype, shape and"),
    "entry without offsets": (
        entry(data_offsets=MISSING),
        f"{WEIGHTS} .* tensor {IMG_IN} is not described by dtype, shape",
    ),
    "entry with more": (
        entry(file="/etc/passwd"),
        f"{WEIGHTS} .* tensor {IMG_IN} is not described by dtype, shape and",
    ),
    "dtype unknown": (entry(dtype="Q4_K"), f"{WEIGHTS}: tensor {IMG_IN} is stored as Q4_K; expected bfloat16"),
    "dtype a list": (entry(dtype=["F32"]), rf"{WEIGHTS}: tensor {IMG_IN} is stored as \['F32'\]"),
    "dtype null": (entry(dtype=None), f"{WEIGHTS}: tensor {IMG_IN} is stored as None"),
    "dtype long": (entry(dtype="F" * 10**6), f"{WEIGHTS}: tensor {IMG_IN} is stored as F{{100}};"),
    "dtype of another size": (entry(dtype="F64"), f"{WEIGHTS} .* tensor {IMG_IN} .* takes 32768 bytes, not 16384"),
    "shape negative": (entry(shape=[-64, 16, 1, 2, -2]), rf"{WEIGHTS} .* tensor {IMG_IN} has the shape \[-64"),
    "shape of floats": (entry(shape=[64.0, 16, 1, 2, 2]), rf"{WEIGHTS} .* tensor {IMG_IN} has the shape \[64.0"),
    "shape of NaN": (entry(shape=[float("nan")]), rf"{WEIGHTS} .* tensor {IMG_IN} has the shape \[nan\]"),
    "shape of bools": (
        entry(shape=[64, 16, True, 2, 2]),
        rf"{WEIGHTS} .* tensor {IMG_IN} has the shape \[64, 16, True",
    ),
    "shape null": (entry(shape=None), f"{WEIGHTS} .* tensor {IMG_IN} has the shape None"),
    "shape an object": (entry(shape={"0": 64}), f"{WEIGHTS} .* tensor {IMG_IN} has the shape {{'0'"),
    "shape of many": (entry(shape=[1] * 40), f"{WEIGHTS} .* tensor {IMG_IN} has 40 dimensions"),
    "shape huge": (entry(shape=[2**62] * 32), f"{WEIGHTS} .* tensor {IMG_IN} .* takes [0-9]+ bytes, not 16384"),
    "shape beyond": (entry(shape=[2**63]), rf"{WEIGHTS} .* tensor {IMG_IN} has the shape \[9223372036854775808\]"),
    "shape that wraps round": (
        entry(shape=[2**62, 4, 2**13]),
        f"{WEIGHTS} .* tensor {IMG_IN} .* takes [0-9]+ bytes, not",
    ),
    "offsets reversed": (
        header(lambda raw: raw[IMG_IN]["data_offsets"].reverse()),
        f"{WEIGHTS} .* {IMG_IN} .* not -16384",
    ),
    "offsets negative": (entry(data_offsets=[-4, 32764]), rf"{WEIGHTS} .* {IMG_IN} has the data_offsets \[-4, "),
    "offsets of floats": (entry(data_offsets=[0.0, 4.0]), rf"{WEIGHTS} .* {IMG_IN} has the data_offsets \[0.0, 4.0\]"),
    "offsets of bools": (entry(data_offsets=[False, True]), rf"{WEIGHTS} .* {IMG_IN} has the data_offsets \[False"),
    "offsets of text": (entry(data_offsets=["0", "4"]), rf"{WEIGHTS} .* {IMG_IN} has the data_offsets \['0'"),
    "offsets endless": (entry(data_offsets=[0, float("inf")]), rf"{WEIGHTS} .* {IMG_IN} has the data_offsets \[0, inf"),
    "one offset": (entry(data_offsets=[0]), f"{WEIGHTS} .* tensor {IMG_IN} has 5 dimensions and 1 offsets"),
    "offsets beyond": (moved(2**62, 2**62), f"{WEIGHTS} .* tensor .* begins at byte .* of the data; expected"),
    "offsets that overlap": (moved(-4, -4), f"{WEIGHTS} .* tensor {IMG_IN} begins at byte .* of the data; expected"),
    "offsets with a hole": (moved(4, 4), f"{WEIGHTS} .* tensor {IMG_IN} begins at byte .* of the data; expected"),
    "offsets too close": (moved(0, -4), f"{WEIGHTS} .* tensor {IMG_IN} .* takes 16384 bytes, not 16380"),
    "two tensors of one place": (
        header(lambda raw: raw.update(copy=raw[IMG_IN])),
        f"{WEIGHTS} .* tensor {IMG_IN} begins at byte .* of the data; expected",
    ),
    "name with an escape": (renamed(ESCAPE), rf"{WEIGHTS}: a tensor has the name '\\x1b\]0;owned"),
    "name with half a letter": (renamed("\ud800"), rf"{WEIGHTS}: a tensor has the name '\\ud800'"),
    "name of lines": (renamed("a\njoyjax: done"), rf"{WEIGHTS}: a tensor has the name 'a\\njoyjax: done'"),
    "name too long": (renamed("a" * 10**6), f"{WEIGHTS}: a tensor has the name 'a{{100}}'"),
    "no name": (renamed(""), f"{WEIGHTS}: a tensor has the name ''"),
    # the index of shards
    "index of shards cut off": (index_of('{"weight_map": '), "safetensors.index.json is not valid json"),
    "index of shards a list": (index_of("[]"), "safetensors.index.json holds a json list"),
    "index of nothing": (index_of('{"weight_map": {}}'), "safetensors.index.json: weight_map should map each tensor"),
    "index of a list": (index_of('{"weight_map": ["a"]}'), "safetensors.index.json: weight_map should map each tensor"),
    "index of numbers": (
        index_of('{"weight_map": {"a": 1}}'),
        "safetensors.index.json: weight_map should map each tensor",
    ),
    "index there twice": (
        index_of('{"weight_map": {"a": "b", "a": "c"}}'),
        "index.json is not valid json: 'a' is there t",
    ),
    "index too large": (both(index_of("{}"), large(f"{WEIGHTS}.index.json")), "index.json has 1099511627776 bytes"),
    "index to itself": (index_to(f"{Path(WEIGHTS).name}.index.json"), "index.json: '.*index.json' is not the name"),
    "index to the folder above": (index_to(".."), r"index.json: '\.\.' is not the name"),
    "index to a folder below": (index_to("a/b.safetensors"), "index.json: 'a/b.safetensors' is not the name"),
    "index to an absolute name": (index_to("/tmp/b.safetensors"), "index.json: '/tmp/b.safetensors' is not the name"),
    "index to a nul": (index_to("a\0.safetensors"), r"index.json: 'a\\x00.safetensors' is not the name"),
    "index to half a letter": (index_to("\ud800.safetensors"), r"index.json: '\\ud800.safetensors' is not the name"),
    "index to an escape": (index_to(f"{ESCAPE}.safetensors"), r"index.json: '\\x1b\]0;owned.* is not the name"),
    "index to a long name": (index_to("a" * 300 + ".safetensors"), "a{300}.safetensors is not a readable .*too long"),
    "index of an escape": (index_of(json.dumps({"weight_map": {ESCAPE: "a"}})), r"index.json: a tensor .* '\\x1b"),
    "index to a link": (
        both(index_to("b.safetensors"), link("transformer/b.safetensors", "../../elsewhere")),
        "b.safetensors cannot be read: .*No such file",
    ),
    "index to a pipe": (
        both(index_to("b.safetensors"), special("transformer/b.safetensors", os.mkfifo)),
        "b.safetensors cannot be read: not a regular file",
    ),
    # a tokenizer: its readers end the process over some of these
    "tokenizer of code": (change(WORDS, "auto_map", to={"AutoTokenizer": ["evil.A", None]}), f"{WORDS}: auto_map is"),
    "tokenizer of a class": (change(WORDS, "tokenizer_class", to="RagTokenizer"), f"{WORDS}: tokenizer_class is 'RagT"),
    "tokenizer elsewhere": (change(WORDS, "vocab_file", to="/etc/passwd"), f"{WORDS}: vocab_file is '/etc/passwd'"),
    "tokenizer above": (
        change(WORDS, "fast_tokenizer_files", to=["../vae/tokenizer.4.0.json"]),
        rf"{WORDS}: fast_tokenizer_files is \['\.\./vae",
    ),
    "tokenizer large": (
        both(write("tokenizer/merges.txt", b""), large("tokenizer/merges.txt")),
        "merges.txt has 10995",
    ),
    "tokenizer of no kind": (write(TOKENIZER, b"{}"), f"{TOKENIZER} is not of the kind"),
    "tokenizer that aborts": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "/" * 56}),
        f"{TOKENIZER} is not of the kind",
    ),
    "tokenizer that goes on": (
        tokenizer(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [pattern("(.|.|.|\\n)*(?!)"), {"type": "ByteLevel"}]}
        ),
        f"{TOKENIZER} is not of the kind",
    ),
    "tokenizer that panics": (
        change(TOKENIZER, "model", "continuing_subword_prefix", to="a" * 100),
        f"{TOKENIZER} is not of the kind",
    ),
    "tokenizer of another model": (
        change(TOKENIZER, "model", to={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}),
        f"{TOKENIZER} is not of the kind",
    ),
    "token beyond": (
        change(TOKENIZER, "model", "vocab", "A", to=2**32 - 1),
        "/tokenizer has 4294967296 tokens; the text",
    ),
}
DAMAGED: dict[str, tuple[Break, str]] = {
    "NaN": (numbers("float32", np.nan), f"{WEIGHTS}: tensor {IMG_IN} holds NaN or infinity"),
    "infinity in bfloat16": (numbers("bfloat16", -np.inf), f"{WEIGHTS}: tensor {IMG_IN} holds NaN or infinity"),
    "infinity in float16": (numbers("float16", np.inf), f"{WEIGHTS}: tensor {IMG_IN} holds NaN or infinity"),
    "NaN in the VAE": (
        numbers("float32", np.nan, "vae", "quant_conv.bias"),
        "vae/.*.safetensors: tensor quant_conv.bias holds NaN or infinity",
    ),
}
CONVERTED: dict[str, tuple[Break, str]] = {
    "no manifest": (remove(MANIFEST), "holds no weights"),
    "manifest cut off": (truncate(MANIFEST), f"{MANIFEST} is not valid json"),
    "manifest a list": (write(MANIFEST, b"[]"), f"{MANIFEST} holds a json list"),
    "another version": (change(MANIFEST, "version", to=99), f"{MANIFEST}: .*version 99; .* convert the model again"),
    "no networks": (change(MANIFEST, "components", to=MISSING), f"{MANIFEST} is damaged"),
    "network missing": (change(MANIFEST, "components", "vae", to=MISSING), f"{MANIFEST} has no component vae"),
    "parameter missing": (change(MANIFEST, *BIAS, to=MISSING), "vae: .*\n.*parameter quant.bias .* is missing"),
    "parameter elsewhere": (piece(lambda raw: raw["pieces"][0].update(part="../part-00000")), f"{MANIFEST} is damaged"),
    "parameter at a link": (link(PART, "../../elsewhere"), f"{PART} is a link to ../../elsewhere, outside"),
    "parameter in a pipe": (special(f"{PART}/_METADATA", os.mkfifo), f"{PART}/_METADATA cannot be read: not a regular"),
    "pieces that overlap": (
        piece(lambda raw: raw["pieces"].append(raw["pieces"][0])),
        f"{MANIFEST} is damaged .*rows 0",
    ),
    "pieces with a hole": (piece(lambda raw: raw["pieces"][0].update(start=1)), f"{MANIFEST} is damaged .*rows 1"),
    "pieces reversed": (piece(lambda raw: raw["pieces"][0].update(stop=-32)), f"{MANIFEST} is damaged .*rows 0 to -32"),
    "pieces beyond": (
        piece(lambda raw: raw["pieces"][0].update(stop=2**62)),
        f"{MANIFEST} is damaged .*pieces of 46116",
    ),
    "pieces of floats": (
        piece(lambda raw: raw["pieces"][0].update(stop=32.0)),
        f"{MANIFEST} is damaged .*rows 0 to 32.0",
    ),
    "pieces of bools": (piece(lambda raw: raw["pieces"][0].update(start=False)), f"{MANIFEST} is damaged .*rows False"),
    "pieces null": (piece(lambda raw: raw.update(pieces=None)), f"{MANIFEST} is damaged"),
    "no pieces": (piece(lambda raw: raw.update(pieces=[])), f"{MANIFEST} is damaged .*pieces of 0 rows"),
    "shape of the manifest": (piece(lambda raw: raw.update(shape=[2**62, 2**62])), f"{MANIFEST} is damaged"),
    "shape without rows": (piece(lambda raw: raw.update(shape=[])), f"{MANIFEST} is damaged"),
    "manifest deep": (write(MANIFEST, b'{"components":' * 10**5), f"{MANIFEST} is not valid json"),
    "manifest twice": (
        replace(MANIFEST, '"version"', '"version": 2, "version"'),
        f"{MANIFEST} .*'version' is there twice",
    ),
    "manifest large": (large(MANIFEST), f"{MANIFEST} has 1099511627776 bytes"),
    "manifest of an escape": (change(MANIFEST, "components", ESCAPE, to=0), f"{MANIFEST} is damaged"),
    "parameter of integers": (change(MANIFEST, *BIAS, "dtype", to="int8"), f"{MANIFEST} is damaged"),
    "parameter of another shape": (
        piece(lambda raw: (raw.update(shape=[31]), raw["pieces"][0].update(stop=31))),
        r"vae: .*\n.*parameter quant.bias has shape \[31\], expected \[32\]",
    ),
    "base size": (change(MANIFEST, "base_size", to="big"), f"{MANIFEST}: base_size is 'big'"),
    "config of another size": (change(VAE, "base_dim", to=16), "vae: .*\n.*has shape"),
    "no part": (remove(PART), "transformer: .*\n.*part-00000 is missing"),
    "part empty": (both(remove(PART), lambda folder: (folder / PART).mkdir()), f"{PART} cannot be read"),
    "part without arrays": (remove(f"{PART}/ocdbt.process_0"), f"{PART} cannot be read"),
}


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_checkpoint(checkpoint, folder, EDIT.components)
    return folder


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """What reads a pipe, or builds a network of a billion layers, would else go on for ever."""

    def stop(*_: object) -> None:
        pytest.fail("takes too long")

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(LIMIT)
    signal.setitimer(signal.ITIMER_PROF, LIMIT / 20)
    yield
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    for kind, handler in before.items():
        signal.signal(kind, handler)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(joyjax.JoyJaxError, match=message) as raised:
        joyjax.load(folder, dtype="float32")
    assert isinstance(raised.value, CheckpointError)
    assert len(str(raised.value)) < 5000


def test_there_are_many():
    assert len(DIFFUSERS) + len(HOSTILE) + len(DAMAGED) + len(CONVERTED) >= 60


@pytest.mark.parametrize("case", DIFFUSERS | HOSTILE)
def test_a_broken_diffusers_folder(case, checkpoint, tmp_path, monkeypatch):
    apply, message = (DIFFUSERS | HOSTILE)[case]
    monkeypatch.chdir(tmp_path)  # some breaks go elsewhere
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    apply(folder)
    monkeypatch.setattr(Tensors, "read", lambda *_: pytest.fail("a tensor was read before all was checked"))
    refused(folder, message)


@pytest.mark.parametrize("case", DAMAGED)
def test_weights_that_are_not_finite_are_refused(case, checkpoint, tmp_path):
    apply, message = DAMAGED[case]
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    apply(folder)
    refused(folder, message)


@pytest.mark.parametrize("case", CONVERTED)
def test_a_broken_converted_folder(case, converted, tmp_path):
    apply, message = CONVERTED[case]
    folder = shutil.copytree(converted, tmp_path / "model")
    apply(folder)
    refused(folder, message)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.ckpt"])
def test_nothing_is_unpickled(name, checkpoint, tmp_path):
    folder, mark = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "mark"
    (folder / WEIGHTS).unlink()
    (folder / "transformer" / name).write_bytes(pickle.dumps({IMG_IN: Evil(mark)}))
    refused(folder, f"transformer.*{name}")
    assert not mark.exists()


def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path, monkeypatch):
    folder, mark = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "mark"
    for place in ("", "tokenizer", "transformer", "vae", "text_encoder", "scheduler", "processor"):
        for name in ("__init__", "evil", "sitecustomize", "json"):
            (folder / place / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    change(TRANSFORMER, "_auto_map", to={"AutoModel": "evil.A"})(folder)
    change(WORDS, "chat_template", to="{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}")(folder)
    monkeypatch.chdir(folder)
    joyjax.load(folder, dtype="float32")
    change(WORDS, "auto_map", to={"AutoTokenizer": ["evil.A", None]})(folder)
    refused(folder, "auto_map")
    assert not mark.exists()


def test_a_blob_of_the_hubs_cache_is_no_way_out(checkpoint, tmp_path):
    home = tmp_path / "models--someone--demo"
    folder = shutil.copytree(checkpoint, home / "snapshots" / "0123")
    shutil.move(folder / "vae", home / "blobs" / "vae")
    (folder / "vae").symlink_to("../../blobs/vae")
    config = home / "blobs" / "vae" / "config.json"
    shutil.move(config, tmp_path / "secret.json")
    config.symlink_to(tmp_path / "secret.json")
    refused(folder, "vae is a link to ../../blobs/vae, outside")


def claims(shape: list[int], last: int) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, last]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (claims([2**38], 2**40), 0),
        (claims([2**62, 2**62], 2**62), 0),
        (claims([2**38], 2**40), 2**40),
        ((2**39).to_bytes(8, "little"), 2**40),
        ((2**24).to_bytes(8, "little"), 2**40),
        (b"", 2**40),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_claim_of_terabytes_takes_no_memory(tmp_path, data, size, name):
    file = tmp_path / name
    file.write_bytes(data)
    os.truncate(file, max(size, len(data)))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=name):
            Tensors.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# at the command line: what is wrong, in words, and nothing else
TOLD: dict[str, tuple[Break, str, int]] = {
    "a header": (moved(-4, -4), f"tensor {IMG_IN} begins at", 1),
    "a link": (link(VAE, "/etc/passwd"), "outside of the checkpoint", 1),
    "many tensors": (change(TRANSFORMER, "num_layers", to=4), "double_blocks.3", 22),
    "an escape": (change(VAE, f"{ESCAPE}\ud800\u202e", to=0), r"\x1b]0;owned\x07\ud800\u202e = 0 is not known", 1),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_the_program_says(case, checkpoint, tmp_path):
    apply, message, lines = TOLD[case]
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    apply(folder)
    program = [Path(sys.executable).with_name("joyjax"), "info", folder]
    done = subprocess.run(program, capture_output=True, timeout=LIMIT)
    errors = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b""), errors
    assert errors.startswith("joyjax: ")
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == lines
    assert errors.replace("\n", "").isprintable()


def test_what_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nothing' does not exist; name a folder, or a hub id"):
        joyjax.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file' is an empty file; download it again"):
        joyjax.load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        joyjax.load(tmp_path)
    for name in ("a\0b", "a" * 5000, "\ud800"):
        with pytest.raises(CheckpointError, match="model '"):
            joyjax.load(name)
