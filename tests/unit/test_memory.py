"""Whether a model fits: parameters and working memory against the room on a device or the host."""

import json
import shutil

import full_size
import huggingface_hub
import jax
import pytest
import qwen_full_size

from joyjax.convert.source.model import DEMO
from joyjax.errors import RequestError
from joyjax.families.joyimage import EDIT
from joyjax.families.qwen_image import TEXT_TO_IMAGE
from joyjax.families.qwen_image_edit import EDIT as QWEN_EDIT
from joyjax.families.qwen_image_edit import EDIT_PLUS as QWEN_EDIT_PLUS
from joyjax.runtime import memory
from joyjax.runtime.info import Requirement, describe, parameter_requirement
from joyjax.runtime.memory import Budget

GIB = 2**30
T4 = Budget("Tesla T4", host=False, bytes=11 * GIB)
H100 = Budget("NVIDIA H100", host=False, bytes=59 * GIB)


JOYIMAGE = {"transformer": full_size.JOYIMAGE, "text_encoder": full_size.QWEN, "vae": full_size.WAN}


@pytest.mark.parametrize(
    ("family", "configs"),
    [
        (EDIT, JOYIMAGE),
        (TEXT_TO_IMAGE, qwen_full_size.configs()),
        (QWEN_EDIT, qwen_full_size.configs(vision=True)),
        (QWEN_EDIT_PLUS, qwen_full_size.configs(vision=True)),
    ],
    ids=["JoyImage", "Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-Edit-Plus"],
)
def test_the_real_model_is_what_its_configurations_say(family, configs):
    found = parameter_requirement(family.components, configs, "bfloat16")
    assert found == Requirement("bfloat16", family.published.resident_bytes, family.published.staged_bytes)
    assert family.published.working_bytes == memory.working_bytes(family, configs, 1024)
    stages = [stage.stage for stage in family.cost(configs, family.usual(configs, 1024))]
    assert stages == ["prompt", *["references"] * (family is not TEXT_TO_IMAGE), "denoise", "decode"]


def test_the_real_model_fits_where_it_does():
    small, large = memory.real_fit(T4), memory.real_fit(H100)
    assert not small.fits
    assert str(small) == (
        "JoyAI-Image-Edit in bfloat16 needs 45.6 GiB for its parameters and about 1.6 GiB to work: 47.2 GiB. "
        "The Tesla T4 of this machine has 11.0 GiB for JAX: it does NOT fit, 36.2 GiB are missing."
    )
    assert large.fits
    assert str(large).endswith("The NVIDIA H100 of this machine has 59.0 GiB for JAX: it fits.")
    exactly = Budget("a device", host=True, bytes=large.bytes)
    assert memory.real_fit(exactly).fits
    assert not memory.real_fit(Budget("a device", host=True, bytes=large.bytes - 1)).fits
    untold = memory.real_fit(Budget("a device", host=False, bytes=None))
    assert untold.fits
    assert str(untold).endswith("does not report its size.")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_fits_everywhere(dtype):
    fit = memory.what_fits(dtype=dtype, budget_here=T4)
    assert [fit.requirement] == [need for need in describe(DEMO).needs if need.dtype == dtype]
    assert fit.fits
    assert fit.working_bytes == EDIT.published.working_bytes // 64  # 128 × 128 pixels, not 1024 × 1024
    assert fit.model == "the demo model"
    with pytest.raises(RequestError, match="float16"):
        memory.what_fits(dtype="float16")


def test_the_memory_of_this_machine():
    found = memory.budget()
    assert found.host == (jax.default_backend() == "cpu")
    assert found.bytes > GIB
    assert "host memory has" in str(memory.what_fits(budget_here=Budget("cpu", host=True, bytes=GIB)))


def test_of_a_hub_id_no_weights_are_fetched(tmp_path, monkeypatch):
    """And what there is without weights is enough."""
    bare, asked = tmp_path / "bare", []
    shutil.copytree(DEMO, bare, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(bare)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fit = memory.what_fits("someone/a-model@main", budget_here=T4)
    assert fit.requirement == memory.what_fits(budget_here=T4).requirement
    [(name, revision, patterns)] = asked
    assert (name, revision) == ("someone/a-model", "main")
    assert "*.json" in patterns
    assert not any("safetensors" in pattern or "pth" in pattern for pattern in patterns)
    assert json.loads((bare / "joyjax.json").read_text())["base_size"] == 128
