"""The layout of the model's own repository: every name of its files known, and the same conversion from both."""

import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from joyjax.convert import joyimage_original
from joyjax.convert.joyimage import TRANSFORMER
from joyjax.convert.manifest import Manifest
from joyjax.convert.rules import match
from joyjax.convert.wan_vae import VAE
from joyjax.errors import CheckpointError
from joyjax.layers.weights import leaves
from joyjax.runtime.convert import convert_model

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, outputs: int, *inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def transformer_shapes(width: int = 4096, head: int = 128, layers: int = 40, text: int = 4096) -> Shapes:
    """Return the tensors of transformer.pth, as the repository's own module has them."""
    embed = "condition_embedder"
    found = {
        **linear("img_in", width, 16, 1, 2, 2),
        **linear(f"{embed}.time_embedder.linear_1", width, 256),
        **linear(f"{embed}.time_embedder.linear_2", width, width),
        **linear(f"{embed}.time_proj", 6 * width, width),
        **linear(f"{embed}.text_embedder.linear_1", width, text),
        **linear(f"{embed}.text_embedder.linear_2", width, width),
        **linear("proj_out", 64, width),
    }
    for block in range(layers):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            found |= {f"{name}_mod.modulate_table": (1, 6, width)}
            found |= linear(f"{name}_attn_qkv", 3 * width, width) | linear(f"{name}_attn_proj", width, width)
            found |= {f"{name}_attn_{part}_norm.weight": (head,) for part in "qk"}
            found |= linear(f"{name}_mlp.net.0.proj", 4 * width, width) | linear(f"{name}_mlp.net.2", width, 4 * width)
    return found


def vae_shapes(base: int = 96, mult: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> Shapes:
    """Return the tensors of Wan2.1_VAE.pth."""

    def residual(name: str, inputs: int, outputs: int) -> Shapes:
        found = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
        found |= linear(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
        found |= linear(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
        return found if inputs == outputs else found | linear(f"{name}.shortcut", outputs, inputs, 1, 1, 1)

    def middle(half: str, width: int) -> Shapes:
        name = f"{half}.middle"
        found = residual(f"{name}.0", width, width) | residual(f"{name}.2", width, width)
        found |= {f"{name}.1.norm.gamma": (width, 1, 1)}
        return found | linear(f"{name}.1.to_qkv", 3 * width, width, 1, 1) | linear(f"{name}.1.proj", width, width, 1, 1)

    def ends(half: str, first: tuple[int, int], width: int, last: int) -> Shapes:
        found = linear(f"{half}.conv1", *first, 3, 3, 3) | {f"{half}.head.0.gamma": (width, 1, 1, 1)}
        return found | linear(f"{half}.head.2", last, width, 3, 3, 3)

    wide, levels = base * mult[-1], len(mult)
    found = linear("conv1", 32, 32, 1, 1, 1) | linear("conv2", 16, 16, 1, 1, 1)
    found |= ends("encoder", (base, 3), wide, 32) | ends("decoder", (wide, 16), base, 3)
    found |= middle("encoder", wide) | middle("decoder", wide)
    number, width = 0, base
    for level in range(levels):
        for _ in range(blocks):
            found |= residual(f"encoder.downsamples.{number}", width, base * mult[level])
            number, width = number + 1, base * mult[level]
        if level < levels - 1:
            found |= linear(f"encoder.downsamples.{number}.resample.1", width, width, 3, 3)
            if level:
                found |= linear(f"encoder.downsamples.{number}.time_conv", width, width, 3, 1, 1)
            number += 1
    number, width = 0, wide
    for level in reversed(range(levels)):
        for _ in range(blocks + 1):
            found |= residual(f"decoder.upsamples.{number}", width, base * mult[level])
            number, width = number + 1, base * mult[level]
        if level:
            found |= linear(f"decoder.upsamples.{number}.resample.1", width // 2, width, 3, 3)
            if level > 1:
                found |= linear(f"decoder.upsamples.{number}.time_conv", 2 * width, width, 3, 1, 1)
            number, width = number + 1, width // 2
    return found


@pytest.mark.parametrize(
    ("shapes", "known"),
    [
        (transformer_shapes(), "56592ddfd7d0249d3aa527d24161a863"),
        (vae_shapes(), "ccc42284ea13e1ad04693284c7a09be6"),
    ],
    ids=["transformer.pth", "Wan2.1_VAE.pth"],
)
def test_the_names_above_are_those_of_the_published_files(shapes, known):
    # DiffSynth-Studio (configs/model_configs.py) tells files by a hash of their names and shapes.
    entries = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    assert hashlib.md5(",".join(sorted([*entries, *shapes])).encode()).hexdigest() == known


@pytest.mark.parametrize(
    ("component", "raw", "shapes", "rename"),
    [
        (TRANSFORMER, joyimage_original.TRANSFORMER, transformer_shapes(), joyimage_original.transformer_name),
        (VAE, joyimage_original.VAE, vae_shapes(), joyimage_original.vae_name),
    ],
    ids=["transformer", "vae"],
)
def test_every_tensor_of_the_published_files_is_mapped(component, raw, shapes, rename):
    config = component.configure(raw)
    parameters = {path: leaf.shape for path, leaf in leaves(component.abstract(config, jnp.bfloat16).state).items()}
    renamed = {rename(name): shape for name, shape in shapes.items()}
    assert len(renamed) == len(shapes)
    assert len(match(component.rules(config), component.ignored, renamed, parameters, where="it")) == len(parameters)


def test_the_constants_are_those_of_the_diffusers_checkpoint(reference_files):
    for component, raw in ((TRANSFORMER, joyimage_original.TRANSFORMER), (VAE, joyimage_original.VAE)):
        theirs = json.loads((reference_files / component.folder / "config.json").read_text())
        assert component.configure(raw) == component.configure(theirs)


@pytest.mark.parity
def test_names_of_the_autoencoder_become_what_diffusers_makes_of_them():
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = list(vae_shapes())
    theirs = {
        value: key for key, value in utilities.convert_wan_vae_to_diffusers({name: name for name in names}).items()
    }
    assert {name: joyimage_original.vae_name(name) for name in names} == theirs


@pytest.fixture
def originals(checkpoint, tmp_path, monkeypatch):
    """The tiny checkpoint in the original layout; its sizes stand in for the real constants."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = tmp_path / "original"
    shutil.copytree(checkpoint / "text_encoder", folder / joyimage_original.ENCODER)
    for file in [*(checkpoint / "tokenizer").iterdir(), *(checkpoint / "processor").iterdir()]:
        shutil.copy(file, folder / joyimage_original.ENCODER)
    raw = {name: json.loads((checkpoint / name / "config.json").read_text()) for name in ("transformer", "vae")}
    monkeypatch.setattr(joyimage_original, "TRANSFORMER", raw["transformer"])
    monkeypatch.setattr(joyimage_original, "VAE", raw["vae"])
    config, vae = raw["transformer"], raw["vae"]
    head = config["hidden_size"] // config["num_attention_heads"]
    names = {
        "transformer": transformer_shapes(config["hidden_size"], head, config["num_layers"], config["text_dim"]),
        "vae": vae_shapes(vae["base_dim"], tuple(vae["dim_mult"]), vae["num_res_blocks"]),
    }
    for name, file in (("transformer", "transformer.pth"), ("vae", "Wan2.1_VAE.pth")):
        held = load_file(checkpoint / name / "diffusion_pytorch_model.safetensors")
        rename = {"transformer": joyimage_original.transformer_name, "vae": joyimage_original.vae_name}[name]
        (folder / name).mkdir()
        torch.save({old: held[rename(old)] for old in names[name]}, folder / name / file)
    (folder / "infer_config.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return folder


def test_both_layouts_convert_to_the_same(checkpoint, originals, tmp_path):
    theirs = convert_model(checkpoint, tmp_path / "theirs")
    ours = convert_model(originals, tmp_path / "ours")
    assert ours.components.keys() == theirs.components.keys()
    for name, converted in ours.components.items():
        assert converted.parameters == theirs.components[name].parameters  # shapes, dtypes, SHA-256
    assert Manifest.read(tmp_path / "ours") == ours
    assert not (tmp_path / "ran").exists()


def test_two_tensors_of_one_name(originals, tmp_path):
    torch = pytest.importorskip("torch")
    file = originals / "transformer" / "transformer.pth"
    held = torch.load(file)
    held["double_blocks.0.attn.img_attn_proj.bias"] = held["double_blocks.0.img_attn_proj.bias"]  # Diffusers' own name
    torch.save(held, file)
    with pytest.raises(CheckpointError, match="two tensors are 'double_blocks.0.attn.img_attn_proj.bias'"):
        convert_model(originals, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_original_that_is_not_whole(originals, tmp_path):
    shutil.copy(originals / "vae" / "Wan2.1_VAE.pth", originals / "vae" / "second.pth")
    with pytest.raises(CheckpointError, match="vae holds 2 files of weights; expected one"):
        convert_model(originals, tmp_path / "target")
    (originals / "vae" / "second.pth").unlink()
    (originals / "transformer" / "transformer.pth").unlink()
    with pytest.raises(CheckpointError, match="transformer holds 0 files of weights; expected one"):
        convert_model(originals, tmp_path / "target")
    assert not Path(tmp_path / "target").exists()
