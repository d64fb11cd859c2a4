"""What the compiled step contains on an H100, held against the record and against what it must be."""

import json

import gpu_compile
import pytest
from contents import bytes_of, flops, kernels, largest_arrays
from full_size import JOYIMAGE, REFERENCE, TARGET, TEXT
from step_record import RECORD, differences, least_tflop, measure, version

missing = gpu_compile.missing_packages()
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))
TOKENS = TARGET + REFERENCE + TEXT


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
@pytest.mark.slow
def test_the_step_is_as_recorded():
    found = measure("step")
    assert differences(recorded("step"), found, "step") == []
    layers = JOYIMAGE.num_layers
    assert found["kernels"]["__cudnn$fmhaSoftmax"] == layers
    assert found["tflop"] == pytest.approx(least_tflop(layers), rel=0.02)
    assert (found["arguments_gib"] + found["working_gib"]) * 2**30 <= 36e9
    # No scores of all pairs: those of four of the 64 heads alone, in bfloat16, would be larger than any array is.
    assert max(map(bytes_of, found["largest_arrays"])) < 4 * TOKENS**2 * 2


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


def test_what_differs_is_told():
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
