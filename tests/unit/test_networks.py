"""The precision of the networks' products, in the programs of a whole edit."""

import re
from pathlib import Path

import jax
import pytest
from PIL import Image

import joyjax

pytestmark = pytest.mark.jax

# Products of float32 arrays carry one precision for each input, or none, which is the default.
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


def products(folder: Path) -> list[str]:
    """Return the products of all programs that JAX wrote here."""
    return [line for file in folder.rglob("*.mlir") for line in PRODUCT.findall(file.read_text())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_float32_pipeline_are_in_float32(dtype, tmp_path):
    """NVIDIA GPUs compute float32 products in TF32 unless a program asks for more."""
    pipeline = joyjax.load(dtype=dtype)
    jax.clear_caches()
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        joyjax.edit(pipeline, Image.new("RGB", (64, 64)), "make it red", steps=1, guidance_scale=2.0)
    finally:
        jax.config.update("jax_dump_ir_to", "")
    found = products(tmp_path)
    wide = [line for line in found if "bf16" not in line]
    assert len(found) > 100
    if dtype == "float32":
        assert wide == found
        assert all("HIGHEST" in line for line in found), [line for line in found if "HIGHEST" not in line][:3]
    else:
        assert not any("HIGHEST" in line for line in found)
