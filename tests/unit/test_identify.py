"""What a path is that is given as a model: every kind of file and folder that people have, and hostile ones."""

import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import joyjax
from joyjax.convert import manifest
from joyjax.convert.source import identify as module
from joyjax.convert.source.identify import PIPELINES, identify
from joyjax.convert.source.identity import RECIPES
from joyjax.convert.source.model import DEMO, model_folder
from joyjax.errors import CheckpointError
from joyjax.families.registry import FAMILIES
from joyjax.media import metadata

Make = Callable[[Path], Path]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4812\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
WEIGHTS = "diffusion_pytorch_model.safetensors"
EDIT = {"_class_name": "JoyImageEditPipeline", "transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"]}
LAYER = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
SMALL = np.zeros((2, 3), np.float32)


def write(path: Path, data: bytes | str | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(data) if isinstance(data, dict) else data
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def header(entries: dict, size: int | None = None) -> bytes:
    """Return a safetensors file of zeros, with tensors of any dtype: name → (dtype, shape, bytes of a number)."""
    raw, end = {"__metadata__": entries.pop("__metadata__")} if "__metadata__" in entries else {}, 0
    for name, (dtype, shape, item) in entries.items():
        length = int(np.prod(shape)) * item
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(raw).encode()
    return (len(text).to_bytes(8, "little") + text + bytes(end))[:size]


def gguf(values: dict, tensors: int = 894) -> bytes:
    packed = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values))
    for key, value in values.items():
        packed += struct.pack("<Q", len(key)) + key.encode()
        if isinstance(value, str):
            packed += struct.pack("<IQ", 8, len(value)) + value.encode()
        elif isinstance(value, list):
            packed += struct.pack("<IIQ", 9, 8, len(value))
            packed += b"".join(struct.pack("<Q", len(each)) + each.encode() for each in value)
        else:
            packed += struct.pack("<II", 4, value)
    return packed


def file(name: str, data: bytes | str | dict) -> Make:
    return lambda folder: write(folder / name, data)


def tensors(*names: str, dtype: str = "BF16", shape: tuple[int, ...] = (4, 8), item: int = 2, **more: tuple) -> Make:
    return file("m.safetensors", header({**{name: (dtype, shape, item) for name in names}, **more}))


def archive(kind: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / f"model.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as opened:
                opened.writestr("model/model_index.json", "{}")
        else:
            with tarfile.open(path, "w:gz" if kind == "gz" else "w") as opened:
                opened.addfile(tarfile.TarInfo("model/model_index.json"))
        return path

    return make


def torch_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "m.ckpt", "w") as opened:
        opened.writestr("archive/data.pkl", b"\x80\x02}.")
    return folder / "m.ckpt"


def picture(name: str) -> Make:
    def make(folder: Path) -> Path:
        Image.new("RGB", (4, 4)).save(folder / name)
        return folder / name

    return make


def png_with_recipe(folder: Path) -> Path:
    chunk = metadata.PngInfo()
    chunk.add_itxt(metadata.CHUNK, "{}")
    Image.new("RGB", (4, 4)).save(folder / "edit.png", pnginfo=chunk)
    return folder / "edit.png"


def onnx(folder: Path) -> Path:
    return write(folder / "m.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01" + bytes(100))


lora = {"L": ("BF16", (32, 8), 2), "R": ("BF16", (24, 32), 2)}


def pair(left: str, right: str) -> Make:
    return file("l.safetensors", header({left: lora["L"], right: lora["R"]}))


FILES: dict[str, tuple[Make, str, str, str]] = {
    "GGUF": (
        file("q.gguf", gguf({"general.architecture": "wan", "words": ["a", "bc"], "general.file_type": 15})),
        "gguf",
        "foreign",
        r"a GGUF file \(architecture 'wan', Q4_K_M, 894 tensors\); this version of joyjax does not read GGUF; ",
    ),
    "GGUF without a suffix": (file("blob", gguf({})), "gguf", "foreign", r"a GGUF file \(894 tensors\)"),
    "GGUF cut off": (file("q.gguf", b"GGUF\3\0"), "gguf", "broken", "a truncated GGUF file"),
    "GGUF of a huge array": (
        file("q.gguf", b"GGUF" + struct.pack("<IQQ", 3, 5, 2**60) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**62)),
        "gguf",
        "foreign",
        "5 tensors",
    ),
    "DiffSynth's LoRA": (
        pair(
            "double_blocks.0.img_attn_qkv.lora_A.default.weight", "double_blocks.0.img_attn_qkv.lora_B.default.weight"
        ),
        "lora",
        "foreign",
        r"a LoRA \(for JoyImage, 1 module, rank 32, with DiffSynth's names\); this version of joyjax does not apply",
    ),
    "kohya's LoRA": (
        pair(
            "lora_unet_transformer_blocks_0_img_mlp_net_2.lora_down.weight",
            "lora_unet_transformer_blocks_0_img_mlp_net_2.lora_up.weight",
        ),
        "lora",
        "foreign",
        r"a LoRA \(for Qwen-Image, 1 module, rank 32, with kohya's names\)",
    ),
    "ComfyUI's LoRA": (
        pair(
            "diffusion_model.double_blocks.0.attn.img_attn_qkv.lora_A.weight",
            "diffusion_model.double_blocks.0.attn.img_attn_qkv.lora_B.weight",
        ),
        "lora",
        "foreign",
        r"a LoRA \(for JoyImage, .* with ComfyUI's names\)",
    ),
    "an old LoRA": (pair("unet.x.lora.up.weight", "unet.x.lora.down.weight"), "lora", "foreign", "a LoRA "),
    "LoKr": (pair("x.lokr_w1", "x.lokr_w2_a"), "lora", "foreign", "an adapter of the kind LoKr"),
    "LoHa": (pair("x.hada_w1_a", "x.hada_w1_b"), "lora", "foreign", "an adapter of the kind LoHa"),
    "DoRA": (pair("x.lora_A.weight", "x.lora_magnitude_vector"), "lora", "foreign", "an adapter of the kind DoRA"),
    "full difference": (pair("x.diff", "x.diff_b"), "lora", "foreign", "an adapter of the kind full difference"),
    "ComfyUI's transformer": (
        tensors("diffusion_model.double_blocks.0.attn.img_attn_qkv.weight", "model.diffusion_model.img_in.weight"),
        "single-file",
        "foreign",
        r"one component: JoyImage transformer \(2 tensors, BF16\); a single file has no tokenizer",
    ),
    "ComfyUI's int8": (
        file(
            "m.safetensors",
            header(
                {
                    "double_blocks.0.attn.img_attn_qkv.weight": ("I8", (4, 8), 1),
                    "double_blocks.0.attn.img_attn_qkv.weight_scale": ("F32", (4, 1), 4),
                    "double_blocks.0.attn.img_attn_qkv.comfy_quant": ("U8", (60,), 1),
                    "__metadata__": {"_quantization_metadata": '{"layers": {"a": {"format": "int8_tensorwise"}}}'},
                }
            ),
        ),
        "single-file",
        "foreign",
        r"JoyImage transformer \(3 tensors, ComfyUI, int8_tensorwise\)",
    ),
    "ComfyUI's int8, named in a tensor": (
        lambda folder: write(
            folder / "m.safetensors",
            header({"a.weight": ("I8", (4, 8), 1), "a.comfy_quant": ("U8", (len(LAYER),), 1)})[: -len(LAYER)] + LAYER,
        ),
        "safetensors",
        "foreign",
        r"\(2 tensors, ComfyUI, int8_tensorwise with ConvRot\)",
    ),
    "fp8 with a mark": (
        tensors("double_blocks.0.attn.img_attn_qkv.weight", "scaled_fp8", dtype="F8_E4M3", item=1),
        "single-file",
        "foreign",
        "fp8 with scales",
    ),
    "fp8 of no scales": (
        tensors("transformer_blocks.0.img_mlp.net.2.weight", dtype="F8_E5M2", item=1),
        "single-file",
        "foreign",
        r"Qwen-Image transformer \(1 tensor, fp8 without scales\)",
    ),
    "Nunchaku": (
        tensors("transformer_blocks.0.img_mod.1.qweight", "transformer_blocks.0.img_mod.1.wscales", dtype="I8", item=1),
        "single-file",
        "foreign",
        "Nunchaku SVDQuant",
    ),
    "all in one": (
        tensors("model.diffusion_model.input_blocks.0.weight", "first_stage_model.encoder.conv_in.weight"),
        "single-file",
        "foreign",
        "several components in one file",
    ),
    "a VAE": (tensors("encoder.downsamples.0.residual.0.gamma"), "single-file", "foreign", "one component: Wan VAE"),
    "another VAE": (tensors("encoder.conv_in.weight"), "single-file", "foreign", "one component: VAE"),
    "a text encoder": (
        tensors("visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.up_proj.weight"),
        "single-file",
        "foreign",
        "one component: Qwen-VL text encoder",
    ),
    "other tensors": (tensors("a", "b"), "safetensors", "foreign", "tensors of an unknown network"),
    "cut off in its data": (
        file("m.safetensors", header({"a": ("F32", (100,), 4)}, 200)),
        "safetensors",
        "broken",
        r"an incomplete safetensors file: it has 200 bytes of \d+; download it again",
    ),
    "cut off in its header": (
        file("m.safetensors", header({"a": ("F32", (100,), 4)}, 30)),
        "safetensors",
        "broken",
        r"a damaged or incomplete safetensors file \(30 bytes are too few for a header of \d+\)",
    ),
    "PyTorch's zip": (torch_zip, "pickle", "foreign", r"pickled weights \(PyTorch, .*joyjax unpickles nothing"),
    "a pickle": (file("m.pt", pickle.dumps({"a": 1})), "pickle", "foreign", r"pickled weights \(pickle"),
    "ONNX": (onnx, "onnx", "foreign", "an ONNX file; this version of joyjax does not read it"),
    "HDF5": (file("m.h5", b"\x89HDF\r\n\x1a\n"), "hdf5", "foreign", "an HDF5 file"),
    "LFS pointer": (file("m.safetensors", LFS), "git-lfs", "broken", "a Git LFS pointer.*; run `git lfs pull`"),
    "a page": (file("m.safetensors", PAGE), "web-page", "broken", "an HTML or XML page.*; download it again"),
    "a page in capitals": (file("m", b"<HTML>"), "web-page", "broken", "an HTML or XML page"),
    "an error in words": (file("m", "Invalid username or password."), "text", "unknown", "begins 'Invalid username"),
    "zip": (archive("zip"), "archive", "foreign", "a zip archive; unpack it and give the folder in it that has model"),
    "tar": (archive("tar"), "archive", "foreign", "a tar archive"),
    "tar.gz": (archive("gz"), "archive", "foreign", "a gzip archive"),
    "7z": (file("m.7z", b"7z\xbc\xaf\x27\x1c" + bytes(9)), "archive", "foreign", "a 7z archive"),
    "PNG": (picture("p.png"), "picture", "foreign", "a PNG picture; give a picture to edit with --image"),
    "JPEG": (picture("p.jpg"), "picture", "foreign", "a JPEG picture"),
    "WebP": (picture("p.webp"), "picture", "foreign", "a WebP picture"),
    "a recipe": (
        png_with_recipe,
        "picture",
        "foreign",
        "a PNG picture with a recipe of joyjax; `joyjax edit --from`",
    ),
    "the index": (file("j/model_index.json", EDIT), "json", "foreign", "the index of a Diffusers folder; give .*/j$"),
    "an index of shards": (
        file("m.index.json", {"weight_map": {}}),
        "json",
        "foreign",
        "the index of a component's weig",
    ),
    "a workflow": (file("w.json", {"3": {"class_type": "KSampler"}}), "workflow", "foreign", "a workflow of ComfyUI"),
    "another json": (file("a.json", {"a": 1}), "json", "foreign", "a json file; joyjax takes"),
    "deep json": (file("a.json", b"[" * 100_000), "json", "broken", "a json file that cannot be used"),
    "empty": (file("e.safetensors", b""), "empty", "broken", "an empty file; download it again"),
    "zeros": (file("z.bin", bytes(99)), "unknown", "unknown", "a file of 99 bytes in an unknown format"),
    "a huge header": (
        file("m.safetensors", b"\xff" * 7 + b"\x7f{}"),
        "safetensors",
        "broken",
        "a damaged or incomplete",
    ),
    "a deep header": (
        file("m.safetensors", (10**6).to_bytes(8, "little") + b'{"a":' * 200_000),
        "safetensors",
        "broken",
        "its header is not a json object: it is nested too deeply",
    ),
    "odd entries": (
        file(
            "m.safetensors",
            (lambda t: len(t).to_bytes(8, "little") + t)(b'{"a":3,"b":{"shape":"x","dtype":[]},"c":{}}'),
        ),
        "safetensors",
        "foreign",
        "tensors of an unknown network",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(case, tmp_path):
    make, kind, state, text = FILES[case]
    path = make(tmp_path)
    found = identify(path)
    assert (found.kind, found.state) == (kind, state), found
    assert re.search(text, f"{found.what}; {found.advice}"), str(found)
    assert str(found).startswith(f"{path} is ")
    assert "\n" not in str(found)
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    if kind != "picture":  # as a model, every one of them is refused in the same words
        with pytest.raises(CheckpointError) as raised:
            joyjax.load(path)
        assert str(raised.value).endswith(f"is {found.what}; {found.advice}")


def pipeline(folder: Path, **more: bytes | str | dict) -> Path:
    """Write a folder with the outline of a JoyImage-Edit, and files by name, with `__` for the slash."""
    write(folder / "joy" / "model_index.json", EDIT)
    for component in ("transformer", "vae"):
        write(folder / "joy" / component / "config.json", {"_class_name": "X"})
        write(folder / "joy" / component / WEIGHTS, header({"a": ("BF16", (2,), 2)}))
    for name, data in more.items():
        write(folder / "joy" / name.replace("__", "/"), data)
    return folder / "joy"


def outline(names: dict[str, bytes | str | dict], without: str = "") -> Make:
    def make(folder: Path) -> Path:
        place = pipeline(folder, **names)
        if without:
            (place / without).unlink()
        return place

    return make


def files(where: str, **named: bytes | str | dict) -> Make:
    def make(folder: Path) -> Path:
        (folder / where).mkdir(parents=True, exist_ok=True)
        for name, data in named.items():
            write(folder / name.replace("__", "/"), data)
        return folder / where

    return make


def whole(path: str) -> Make:
    return lambda folder: pipeline(folder) / path


FOLDERS: dict[str, tuple[Make, str, str, str]] = {
    "the demo": (lambda folder: DEMO, "pipeline", "runs", "a Diffusers folder of JoyImageEditPipeline; joyjax runs it"),
    "Diffusers": (outline({}), "pipeline", "runs", "a Diffusers folder of JoyImageEditPipeline; joyjax runs it"),
    "another pipeline": (
        outline({"model_index.json": {"_class_name": "FluxPipeline"}}),
        "other-pipeline",
        "foreign",
        "another pipeline, FluxPipeline; this version of joyjax runs JoyImageEditPipeline, JoyImageEditPlusPipeline",
    ),
    "a pipeline of no class": (
        outline({"model_index.json": {}}),
        "other-pipeline",
        "foreign",
        "another pipeline, None",
    ),
    "a modular pipeline": (
        files("m", m__modular_model_index=b"", **{"m__modular_model_index.json": {"_class_name": "A"}}),
        "other-pipeline",
        "foreign",
        "a modular pipeline, A",
    ),
    "a damaged index": (outline({"model_index.json": b"{"}), "pipeline", "broken", "damaged .*not valid json"),
    "converted": (
        outline({"joyjax.json": {"format": manifest.FORMAT}}),
        "converted",
        "runs",
        "a converted folder of JoyImageEditPipeline",
    ),
    "converted, without its index": (
        files("m", **{"m__joyjax.json": {"format": manifest.FORMAT}}),
        "converted",
        "broken",
        "a converted folder that is damaged: model_index.json is missing; convert the model again",
    ),
    "the model's own repository": (
        files("m", **{"m__JoyAI-Image-Und__config.json": {"model_type": "qwen3_vl"}}),
        "own-layout",
        "converts",
        "in the layout of its own repository; convert it first: joyjax convert .*/m TARGET",
    ),
    "an unfinished conversion": (
        files("m", **{".m.unfinished__lock": b""}),
        "unfinished",
        "broken",
        "is unfinished; run",
    ),
    "its work": (files(".m.unfinished"), "unfinished", "broken", "the work folder of an unfinished conversion to m"),
    "a component": (whole("transformer"), "component", "foreign", r"its transformer \(X\); give the folder .*/joy$"),
    "a component alone": (
        files("v", **{"v__config.json": {"_class_name": "AutoencoderKLWan"}}),
        "component",
        "foreign",
        r"its vae \(AutoencoderKLWan\); give the folder of the whole pipeline, which has model_index.json; .* has none",
    ),
    "a scheduler": (
        files("s", **{"s__scheduler_config.json": {}}),
        "component",
        "foreign",
        "its scheduler; give the folder",
    ),
    "a tokenizer": (files("t", **{"t__vocab.json": {}}), "component", "foreign", "its tokenizer"),
    "a processor": (files("p", **{"p__preprocessor_config.json": {}}), "component", "foreign", "its processor"),
    "the original's encoder": (
        files("m/JoyAI-Image-Und", **{"m__JoyAI-Image-Und__config.json": {"architectures": ["Qwen3VL"]}}),
        "component",
        "foreign",
        r"its text_encoder \(Qwen3VL\); convert the folder of the whole model: joyjax convert .*/m TARGET",
    ),
    "a language model": (
        files("l", **{"l__config.json": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}}),
        "transformers",
        "foreign",
        "a single model of Transformers, Qwen3ForCausalLM; a text encoder is one part of a model",
    ),
    "a config of nothing": (files("c", **{"c__config.json": {"a": 1}}), "unknown", "unknown", "names no class"),
    "a config cut off": (
        files("c", **{"c__config.json": b'{"a'}),
        "unknown",
        "broken",
        "that cannot be used .*not valid",
    ),
    "a config that is a pointer": (
        files("c", **{"c__config.json": LFS}),
        "git-lfs",
        "broken",
        "a folder whose config.json is a Git LFS pointer.*; run `git lfs pull`",
    ),
    "PEFT": (
        files("a", **{"a__adapter_config.json": {"peft_type": "LORA", "r": 16, "base_model_name_or_path": "o/m"}}),
        "lora",
        "foreign",
        r"an adapter of PEFT \(LORA, rank 16, of 'o/m'\)",
    ),
    "a variant": (
        outline({f"transformer__{WEIGHTS.replace('.s', '.fp16.s')}": b"x"}, f"transformer/{WEIGHTS}"),
        "variant",
        "foreign",
        "transformer holds no .*, only .*fp16.*, of the variant 'fp16'; .*download the files without .fp16",
    ),
    "shards of a variant": (
        outline({"vae__model.bf16-00001-of-00002.safetensors": b"x"}, f"vae/{WEIGHTS}"),
        "variant",
        "foreign",
        "of the variant 'bf16'",
    ),
    "pickles": (
        outline({"vae__diffusion_pytorch_model.bin": b"\x80\x02"}, f"vae/{WEIGHTS}"),
        "pickle",
        "foreign",
        "vae holds pickled weights only .*; joyjax reads safetensors only",
    ),
    "fp8": (
        outline({f"transformer__{WEIGHTS}": header({"a.weight": ("F8_E4M3", (4, 4), 1)})}),
        "quantised",
        "foreign",
        r"the weights of transformer are quantised \(fp8 without scales\); joyjax reads float32",
    ),
    "bitsandbytes": (
        outline({"transformer__config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}}),
        "quantised",
        "foreign",
        r"quantised \(bitsandbytes\)",
    ),
    "LFS pointers": (
        outline({f"vae__{WEIGHTS}": LFS, "tokenizer__tokenizer.json": LFS}),
        "git-lfs",
        "broken",
        "with 2 Git LFS pointers in place of files, such as tokenizer/tokenizer.json; run `git lfs pull`",
    ),
    "the folder above": (
        lambda f: pipeline(f).parent,
        "parent",
        "foreign",
        "that holds a Diffusers folder; give .*/joy$",
    ),
    "components": (
        outline({"transformer__config.json": {}}, "model_index.json"),
        "incomplete",
        "broken",
        "with the components transformer, vae, but model_index.json is missing; download the rest",
    ),
    "the hub's cache": (
        files("models--o--m/snapshots/abc", **{"models--o--m__snapshots__abc__model_index.json": EDIT}),
        "pipeline",
        "runs",
        "",
    ),
    "the top of the hub's cache": (
        lambda folder: FOLDERS["the hub's cache"][0](folder).parents[1],
        "hub-cache",
        "foreign",
        "a folder of the hub's cache; give the hub id, o/m, or a folder in .*/snapshots",
    ),
    "a download": (
        files("d", **{"d__m.safetensors.incomplete": b""}),
        "incomplete",
        "broken",
        "an unfinished download",
    ),
    "single files": (
        files("d", d__README=b"", **{"d__q.gguf": gguf({"general.architecture": "wan"})}),
        "gguf",
        "foreign",
        r"a folder of one file of weights, without model_index.json; q.gguf is a GGUF file \(architecture 'wan'",
    ),
    "ComfyUI's folders": (
        files("d", **{"d__diffusion_models__a.safetensors": header({"img_in.weight": ("BF16", (2,), 2)})}),
        "safetensors",
        "foreign",
        "a folder of one file of weights, .*diffusion_models/a.safetensors is a single safetensors file",
    ),
    "empty": (files("e"), "empty", "broken", "an empty folder: model_index.json is missing"),
    "something else": (
        files("x", x__a=b"a"),
        "unknown",
        "unknown",
        "of an unknown kind: model_index.json is",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder(case, tmp_path):
    make, kind, state, text = FOLDERS[case]
    found = identify(make(tmp_path))
    assert (found.kind, found.state) == (kind, state), found
    assert re.search(text, f"{found.what}; {found.advice}"), str(found)
    assert "\n" not in str(found)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


WITHOUT_INDEX = [case for case, (_, kind, *_) in FOLDERS.items() if kind not in ("pipeline", "variant", "quantised")]


@pytest.mark.parametrize("case", [case for case in WITHOUT_INDEX if "pointers" not in case and case != "pickles"])
def test_loading_a_folder_says_what_it_is(case, tmp_path):
    path = FOLDERS[case][0](tmp_path)
    found = identify(path)
    if not (path / "model_index.json").exists():
        with pytest.raises(CheckpointError) as raised:
            joyjax.load(path)
        assert str(raised.value).endswith(f"{found.what}; {found.advice}")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer/tokenizer.json", LFS, "tokenizer.json is a Git LFS pointer.*: run `git lfs pull`"),
        ("transformer/config.json", PAGE, "config.json is an HTML or XML page.*: download it again"),
        (f"transformer/{WEIGHTS}", LFS, "model.safetensors is a Git LFS pointer"),
        (
            f"transformer/{WEIGHTS}",
            header({"a": ("F8_E4M3", (4, 4), 1)}),
            r"holds quantised weights \(fp8 without scal",
        ),
        (
            f"transformer/{WEIGHTS}",
            header(
                {"a.weight": ("I8", (4, 4), 1), "a.weight_scale": ("F32", (4,), 4), "a.comfy_quant": ("U8", (2,), 1)}
            ),
            r"holds quantised weights \(ComfyUI, int8\); joyjax reads float32",
        ),
    ],
)
def test_loading_says_what_stands_in_place_of_a_file(name, data, says, tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    write(folder / name, data)
    with pytest.raises(CheckpointError, match=says):
        joyjax.load(folder)


def test_loading_a_quantised_configuration(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    write(folder / "transformer" / "config.json", config | {"quantization_config": {"quant_method": "torchao"}})
    with pytest.raises(CheckpointError, match=r"transformer/config.json: quantization_config: .*quantised \(torchao\)"):
        joyjax.load(folder)


def test_a_component_of_the_original_given_by_its_file(tmp_path):
    write(tmp_path / "m" / "JoyAI-Image-Und" / "config.json", {})
    found = identify(write(tmp_path / "m" / "transformer" / "transformer.pth", b"\x80\x02}."))
    assert found.advice == f"convert the folder of the whole model: joyjax convert {tmp_path / 'm'} TARGET"


def test_a_file_of_a_component_names_the_pipeline(tmp_path):
    folder = pipeline(tmp_path)
    for name in (f"transformer/{WEIGHTS}", "vae/config.json"):
        assert identify(folder / name).advice == f"give the folder of the whole pipeline: {folder}"


def test_relative_paths(tmp_path, monkeypatch):
    folder = pipeline(tmp_path)
    monkeypatch.chdir(folder / "vae")
    assert identify(".").advice == f"give the folder of the whole pipeline: {folder}"
    assert identify("..").state == "runs"


# files that are none


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert identify(tmp_path / "pipe").what == "a named pipe, not a file"
    folder = pipeline(tmp_path)
    for name in ("model_index.json", "transformer/config.json", f"vae/{WEIGHTS}"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert identify(folder).state == "broken"
    write(tmp_path / "joy2" / "x", b"")
    os.mkfifo(tmp_path / "joy2" / "config.json")
    assert identify(tmp_path / "joy2").state in ("broken", "unknown")


def test_devices_and_links(tmp_path):
    assert identify("/dev/zero").what == "a device, not a file"
    (tmp_path / "loop").symlink_to("loop")
    assert identify(tmp_path / "loop").state == "broken"
    (tmp_path / "gone").symlink_to("nothing")
    assert identify(tmp_path / "gone").what == "a link to nothing, which does not exist"
    with pytest.raises(CheckpointError, match="is a link to nothing, which does not exist"):
        model_folder(tmp_path / "gone")
    folder = pipeline(tmp_path)
    (folder / "vae" / "again").symlink_to("..")
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("config.json")
    assert identify(folder).kind == "pipeline"


def test_what_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "secret.safetensors", b"x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        assert identify(path).what == "a file that cannot be read (Permission denied)"
    monkeypatch.setattr(module.os, "scandir", refuse)
    assert identify(tmp_path).what == "something that cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "\ud800", "", "nothing"])
def test_names_that_no_file_has(name):
    assert isinstance(str(identify(name)), str)


def test_random_bytes_never_raise(tmp_path):
    chance = random.Random(0)
    starts = [b"", b"GGUF", b"PK\3\4", b"\x80\x02", b"{", bytes(8) + b"{", b"\x89PNG\r\n\x1a\n", gguf({"a": ["b"]})]
    for number in range(300):
        start = starts[number % len(starts)]
        data = start[: chance.randrange(len(start) + 1)] + chance.randbytes(chance.randrange(600))
        path = write(tmp_path / f"f{('.safetensors', '', '.json')[number % 3]}", data)
        found = identify(path)
        json.dumps(dataclasses.asdict(found), allow_nan=False)
        assert "\n" not in str(found)


def test_what_is_read_of_a_file_is_bounded(tmp_path):
    path = write(tmp_path / "q.gguf", gguf({"general.architecture": "wan"}))
    os.truncate(path, 2**40)
    assert identify(path).details["architecture"] == "wan"
    path = write(tmp_path / "big.json", b"{")
    os.truncate(path, 2**40)
    assert identify(path).state == "broken"
    path = write(tmp_path / "m.safetensors", (2**39).to_bytes(8, "little") + b"{")
    os.truncate(path, 2**40)
    assert identify(path).state == "broken"


# one place for each fact


def test_the_pipelines_are_those_of_the_registry():
    assert set(PIPELINES) == set(FAMILIES)
    assert {component.folder for family in FAMILIES.values() for component in family.components} == set(module.NETWORKS)


def test_the_recipe_is_found_by_its_own_name():
    assert RECIPES[0] == b"iTXt" + metadata.CHUNK.encode() + b"\0"
    assert RECIPES[1].decode() in metadata.PACKET


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from joyjax.convert.source.identify import identify; print(identify(sys.argv[1]).kind); "
        "print(*[name for name in ('jax', 'numpy', 'PIL', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(DEMO)], capture_output=True, text=True, check=True)
    assert done.stdout == "pipeline\n\n"


# hub ids in another form

SAID = {
    "https://huggingface.co/owner/name": "give the hub id: owner/name$",
    "https://huggingface.co/owner/na.me/tree/main": "give the hub id: owner/na.me$",
    "http://hf.co/owner/name/blob/v2/model_index.json": "give the hub id: owner/name@v2$",
    "huggingface.co/owner/name/": "give the hub id: owner/name$",
    "https://huggingface.co/owner/name/resolve/main/a.safetensors?download=true": "give the hub id: owner/name$",
    "hf://owner/name": "give the hub id: owner/name$",
    "hf:owner/name": "give the hub id: owner/name$",
    "owner/name/tree/main": "give the hub id: owner/name$",
    "owner/name/tree/v1/transformer": "give the hub id: owner/name@v1$",
    "https://huggingface.co/datasets/owner/name": "the address of one of the hub's datasets",
    "https://huggingface.co/spaces/owner/name": "the address of one of the hub's spaces",
    "https://example.org/model.zip": "download it, and give the folder",
    "owner/name/transformer": "name a folder, or a hub id such as",
    "out/model/": "name a folder, or a hub id such as",
}


@pytest.mark.parametrize("text", SAID)
def test_a_hub_id_in_another_form(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not exist; .*{SAID[text]}"):
        model_folder(text)


def test_a_saved_checkpoint_of_safetensors_is_read(tmp_path):
    save_file({"double_blocks.0.attn.img_attn_qkv.weight": SMALL}, tmp_path / "m.safetensors")
    assert identify(tmp_path / "m.safetensors").details["dtypes"] == {"F32": 1}
    buffer = io.BytesIO()
    np.savez(buffer, a=SMALL)
    assert identify(write(tmp_path / "m.npz", buffer.getvalue())).kind == "numpy"
