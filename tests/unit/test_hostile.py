"""Broken checkpoint folders: always one CheckpointError that names the file, never another exception."""

import json
import shutil
from collections.abc import Callable
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


def rename(name: str, to: str) -> Break:
    return lambda folder: (folder / name).rename(folder / to)


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
    "config infinite": (change(TRANSFORMER, "theta", to=float("inf")), f"{TRANSFORMER}: .*theta"),
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
    "tokenizer cut off": (truncate(TOKENIZER), "tokenizer in .*tokenizer cannot be read"),
    "tokenizer empty": (write(TOKENIZER, b""), "tokenizer in .*tokenizer cannot be read"),
    "tokenizer settings": (write(WORDS, b"{"), "tokenizer in .*tokenizer cannot be read"),
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
CONVERTED: dict[str, tuple[Break, str]] = {
    "no manifest": (remove(MANIFEST), "holds no weights"),
    "manifest cut off": (truncate(MANIFEST), f"{MANIFEST} is not valid json"),
    "manifest a list": (write(MANIFEST, b"[]"), f"{MANIFEST} holds a json list"),
    "another version": (change(MANIFEST, "version", to=99), f"{MANIFEST}: .*version 99; .* convert the model again"),
    "no networks": (change(MANIFEST, "components", to=MISSING), f"{MANIFEST} is damaged"),
    "network missing": (change(MANIFEST, "components", "vae", to=MISSING), f"{MANIFEST} has no component vae"),
    "parameter missing": (change(MANIFEST, *BIAS, to=MISSING), "vae: .*\n.*parameter quant.bias .* is missing"),
    "parameter elsewhere": (change(MANIFEST, *BIAS, "part", to="../part-00000"), f"{MANIFEST} is damaged"),
    "parameter of integers": (change(MANIFEST, *BIAS, "dtype", to="int8"), f"{MANIFEST} is damaged"),
    "parameter of another shape": (
        change(MANIFEST, *BIAS, "shape", to=[31]),
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


@pytest.mark.parametrize("case", DIFFUSERS)
def test_a_broken_diffusers_folder(case, checkpoint, tmp_path, monkeypatch):
    apply, message = DIFFUSERS[case]
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    apply(folder)
    monkeypatch.setattr(Tensors, "read", lambda *_: pytest.fail("a tensor was read before all was checked"))
    with pytest.raises(CheckpointError, match=message):
        joyjax.load(folder, dtype="float32")


@pytest.mark.parametrize("case", CONVERTED)
def test_a_broken_converted_folder(case, converted, tmp_path):
    apply, message = CONVERTED[case]
    folder = shutil.copytree(converted, tmp_path / "model")
    apply(folder)
    with pytest.raises(CheckpointError, match=message):
        joyjax.load(folder, dtype="float32")


def test_what_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nothing' does not exist; download one with"):
        joyjax.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file' is not a folder"):
        joyjax.load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="model_index.json is missing"):
        joyjax.load(tmp_path)
