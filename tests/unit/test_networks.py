"""The programs of a whole edit: the precision of their products, and the names that a profile shows."""

import re
from pathlib import Path

import jax
import pytest
from PIL import Image

import joyjax

pytestmark = pytest.mark.jax

# Products of float32 arrays carry one precision for each input, or none, which is the default.
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


# By stage, names that must be in the debug information of its program, as a profile shows them.
SCOPES = {
    "encode_prompt": ("vision/block_0/attention", "vision/block_0/mlp", "merger", "layer_1/attention", "layer_1/mlp/"),
    "encode_images": ("block_0/norm", "middle/attention"),
    "predict": ("time", "text", "block_0/norm", "block_0/attention", "block_1/mlp", "block_5/attention", "head"),
    "advance": ("guidance", "solver"),
    "decode_latents": ("middle/attention/norm", "block_0/norm"),
}


def programs_of_an_edit(dtype: str, folder: Path) -> None:
    """Write the programs of an edit into a folder."""
    pipeline = joyjax.load(dtype=dtype)
    jax.clear_caches()
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        joyjax.edit(pipeline, Image.new("RGB", (64, 64)), "make it red", steps=1, guidance_scale=2.0)
    finally:
        jax.config.update("jax_dump_ir_to", "")


def products(folder: Path) -> list[str]:
    """Return the products of all programs that JAX wrote here."""
    return [line for file in folder.rglob("*.mlir") for line in PRODUCT.findall(file.read_text())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_float32_pipeline_are_in_float32(dtype, tmp_path):
    """NVIDIA GPUs compute float32 products in TF32 unless a program asks for more."""
    programs_of_an_edit(dtype, tmp_path)
    found = products(tmp_path)
    wide = [line for line in found if "bf16" not in line]
    assert len(found) > 100
    if dtype == "float32":
        assert wide == found
        assert all("HIGHEST" in line for line in found), [line for line in found if "HIGHEST" not in line][:3]
    else:
        assert not any("HIGHEST" in line for line in found)


def test_layers_and_stages_have_names_in_a_profile(tmp_path):
    """They were nameless: a profile showed jit(predict)/dot_general for every product of every block."""
    programs_of_an_edit("bfloat16", tmp_path)
    for stage, scopes in SCOPES.items():
        found = "".join(file.read_text() for file in tmp_path.rglob(f"*jit_{stage}_compile*.mlir"))
        missing = [scope for scope in scopes if not re.search(f'"jit\\({stage}\\)/(.*/)?{scope}', found)]
        assert not missing, f"{stage}: {missing}"
