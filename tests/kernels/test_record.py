"""What compiled stages and kernels contain on an H100, held against the record and against what they must be."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_compile
import pytest
from contents import bytes_of, flops, kernels, largest_arrays, loop_slices
from full_size import JOYIMAGE, REFERENCE, TARGET, TEXT
from kernel_record import COLUMNS, kernel_differences, kernel_table
from step_record import RECORD, STAGES, differences, least_tflop, measure, version

from joyjax.kernels.cases import SHAPES

pytestmark = pytest.mark.jax

missing = gpu_compile.missing_packages()
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))
TOKENS = TARGET + REFERENCE + TEXT
ROOT = Path(__file__).parents[2]


def recorded(part: str) -> dict:
    record = json.loads(RECORD.read_text())
    if version() not in record:
        pytest.skip(f"the record has JAX {', '.join(record)}, not {version()}: python benchmarks/record.py --write")
    return record[version()][part]


@needs_compiler
def test_a_block_is_as_recorded():
    found = measure("block")
    assert differences(recorded("block"), found, "block") == []
    assert found["kernels"]["__cudnn$fmhaSoftmax"] == 1  # attention by lengths, without a bias made of a mask
    assert not [name for name in found["kernels"] if "Bias" in name]


@needs_compiler
@pytest.mark.nightly
def test_the_step_is_as_recorded():
    found = measure("step")
    assert differences(recorded("step"), found, "step") == []
    layers = JOYIMAGE.num_layers
    assert found["kernels"]["__cudnn$fmhaSoftmax"] == layers
    assert found["tflop"] == pytest.approx(least_tflop(layers), rel=0.02)
    assert (found["arguments_gib"] + found["working_gib"]) * 2**30 <= 36e9
    # No scores of all pairs: those of four of the 64 heads alone, in bfloat16, would be larger than any array is.
    assert max(map(bytes_of, found["largest_arrays"])) < 4 * TOKENS**2 * 2


@needs_compiler
@pytest.mark.nightly
@pytest.mark.parametrize("part", STAGES)
def test_another_stage_is_as_recorded(part):
    found = measure(part)
    assert differences(recorded(part), found, part) == []
    assert found["tflop"] > 1  # of the convolutions, or of the language model


@needs_compiler
@pytest.mark.parametrize(
    "shape", [name if name == "joyimage" else pytest.param(name, marks=pytest.mark.nightly) for name in SHAPES]
)
def test_kernels_use_what_is_recorded(shape):
    """In a process of its own: Mosaic GPU tells what a kernel uses once, and other tests compile the same kernels."""
    recorded("kernels")
    script = ROOT / "benchmarks" / "record.py"
    command = [sys.executable, str(script), "--parts", "kernels", "--shapes", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["kernels"]
    assert set(found) == set(COLUMNS)
    assert all(row["registers"] > 0 for column in list(COLUMNS)[:2] for row in found[column][shape].values())


def test_no_kernel_of_the_record_spills_and_the_documentation_has_its_table():
    record = json.loads(RECORD.read_text())
    for contents in record.values():
        for column in list(COLUMNS)[:2]:
            assert set(contents["kernels"][column]) == set(SHAPES)
            for rows in contents["kernels"][column].values():
                assert [row["spills"] for row in rows.values()] == [0] * len(rows)
    assert kernel_table(record["0.10.2"]["kernels"]) in (ROOT / "docs" / "kernels.md").read_text()


PROGRAM = """\
%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %copy.9 = f32[8]{0} copy(%p)
}

ENTRY %main (a: bf16[16,32], b: bf16[32,64]) -> f32[8] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %q = bf16[2,10,4,8]{3,2,1,0} parameter(2)
  %k = bf16[2,20,4,8]{3,2,1,0} parameter(3)
  %dot = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]},"epilogue":"BIAS_GELU"}}
  %att = (bf16[2,10,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %copy.1 = f32[8]{0} copy-start(%x)
  ROOT %fusion = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%fused_computation
}
"""


def test_reading_a_program():
    assert kernels(PROGRAM) == {
        "__cublas$lt$matmul BIAS_GELU": 1,
        "__cudnn$fmhaSoftmax": 1,
        "copy": 1,
        "fusion loop": 1,
    }
    assert flops(PROGRAM) == 2 * 16 * 64 * 32 + 4 * 2 * 4 * 10 * 20 * 8
    assert largest_arrays(PROGRAM, 2) == ["s8[4096]", "bf16[16,64]"]
    assert bytes_of("bf16[16,64]") == 2048


def test_differences_to_the_record_are_listed():
    old = {"kernels": {"copy": 100, "fusion loop": 50}, "tflop": 10.0, "arguments_gib": 30.0, "working_gib": 1.0}
    assert differences(old, old, "step") == []
    assert differences(old, old | {"kernels": {"copy": 101, "fusion loop": 50}}, "step") == []
    new = {"kernels": {"copy": 103, "sort": 1}, "tflop": 10.1, "arguments_gib": 30.0, "working_gib": 1.2}
    assert differences(old, new, "step") == [
        "step: 103 × copy; recorded: 100",
        "step: 0 × fusion loop; recorded: 50",
        "step: 1 × sort; recorded: 0",
        "step: 10.1 TFLOP; recorded: 10.0",
        "step: working_gib 1.2; recorded: 1.0",
    ]


LOOP = """\
%slice (p: bf16[3,32,64], n: s32[]) -> bf16[1,32,64] {
  ROOT %cut = bf16[1,32,64]{2,1,0} dynamic-slice(%p, %n, %zero, %zero), dynamic_slice_sizes={1,32,64}
}

%body (t: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %x = bf16[16,32]{1,0} get-tuple-element(%t), index=1
  %w = bf16[1,32,64]{2,1,0} fusion(%p, %n), kind=kLoop, calls=%slice
  %dot = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"epilogue":"DEFAULT"}}
}

ENTRY %main (a: bf16[1,8,8,5]) -> bf16[1,8,8,7] {
  %a = bf16[1,8,8,5]{3,2,1,0} parameter(0)
  %k = bf16[7,3,3,5]{3,2,1,0} parameter(1)
  %while.1 = (s32[], bf16[16,32]) while(%t), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %conv = (bf16[1,8,8,7]{3,2,1,0}, u8[0]{0}) custom-call(%a, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_convolutions_count():
    assert flops(LOOP) == 3 * 2 * 16 * 64 * 32 + 2 * 8 * 8 * 7 * 3 * 3 * 5
    assert loop_slices(LOOP) == [("bf16[1,32,64]{2,1,0}", 3)]


def test_differences_of_a_kernel_are_listed():
    row = {"registers": 100, "spills": 0, "shared": 16, "kernels": 1, "temporaries": 0}

    def found(**changes):
        return kernel_differences(
            {"H100 mosaic": {"wide": {"norm": row}}}, {"H100 mosaic": {"wide": {"norm": row | changes}}}
        )

    name = "H100 mosaic, wide, norm"
    assert found() == found(registers=109) == found(temporaries=4000) == []
    assert found(registers=111) == [f"{name}: 111 registers; recorded: 100"]
    assert found(spills=4) == [f"{name}: 4 bytes spilled"]
    assert found(shared=32) == [f"{name}: shared 32; recorded: 16"]
    assert found(temporaries=9000) == [f"{name}: 9000 bytes of temporaries; recorded: 0"]
    assert kernel_differences({}, {"H100 mosaic": {"wide": {"norm": row}}}) == [f"{name}: only found now"]
