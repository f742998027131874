"""The compiler's dump, read: which buffers lie in HBM at the peak, and who made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu.buffers import read_assignment, read_refusal
from kernel_pytorch.fit.outcome import by_module

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
 value: <1 Arg_0.0 @0> (size=4096,offset=0): f32[32,32]{1,0:T(8,128)}
allocation 1: size 512, page 0, parameter 1, shape |f32[]| at ShapeIndex {}:
 value: <2 Arg_1.0 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 2: size 512, page 0, thread-local:
 value: <3 add.1 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 3: size 512, page 0, output shape is |(f32[32,32])|, maybe-live-out:
 value: <9 tuple{} @0> (size=512,offset=0): (f32[32,32]{1,0})
allocation 4: size 30000, page 0, preallocated-temp:
 value: <4 fusion.1 @0> (size=10000,offset=0): bf16[50,100]{1,0:T(8,128)(2,1)}
 value: <5 fusion.2{0} @0> (size=10000,offset=10000): f32[25,100]{1,0}
 value: <6 fusion.3 @0> (size=8000,offset=0): f32[20,100]{1,0}
 value: <7 copy-start.1{1} @0> (size=9000,offset=20000): (f32[9,250]{1,0}, u32[])
 value: <8 fusion.4 @0> (size=10000,offset=0): bf16[50,100]{1,0}
allocation 5: size 9999999, color 1, page 0, preallocated-temp:
 value: <10 fusion.9 @1> (size=9999999,offset=0): f32[9]{0:S(1)}
"""

RANGES = """HloLiveRange (max 50):
  InstructionSequence:
    0:fusion.1
  BufferLiveRange:
    Arg_0.0{}:0-50
    fusion.1{}:1-10
    fusion.2{0}:5-20
    fusion.3{}:11-30
    copy-start.1{1}:8-9
    fusion.4{}:9-10
    fusion.9{}:0-50
  Live ranges at 9 (peak):
"""

PROGRAM = """HloModule kpt_step
ENTRY %main {
  %Arg_0.0 = f32[32,32]{1,0} parameter(0)
  %fusion.1 = bf16[50,100]{1,0} fusion(%Arg_0.0), metadata={op_name="blocks.0.up/mm_1" stack_frame_id=4}
  %fusion.2 = (f32[25,100]{1,0}) fusion(%fusion.1), metadata={op_name="blocks.0 (backward)/gelu_backward"}
  %copy-start.1 = (f32[9,250]{1,0}, u32[]) copy-start(%fusion.2), backend_config={}
  %fusion.3 = f32[20,100]{1,0} fusion(%Arg_0.0), calls=%c
  ROOT %fusion.4 = bf16[50,100]{1,0} fusion(%fusion.1), metadata={op_name="blocks.0.up/mm_1"}
}
"""


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    stem = "module_0000.kpt_step.cl_1.after_optimizations"
    (tmp_path / f"{stem}-buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / f"{stem}-live-range.txt").write_text(RANGES)
    (tmp_path / f"{stem}.txt").write_text(PROGRAM)
    return tmp_path


def test_the_peak_is_when_most_places_are_taken(dump: Path) -> None:
    found = read_assignment(dump, ["weight", "step"])
    assert (found.argument_bytes, found.heap_bytes, found.output_bytes) == (4608, 30000, 512)
    assert found.bytes == 35120
    held = {b.name: b.bytes for b in found.peak if b.kind == "temporary"}
    # At moment 9 fusion.1 and fusion.4 share a place; fusion.3 comes later; VMEM (color 1) is no HBM.
    assert set(held) - {"fusion.1", "fusion.4"} == {"fusion.2", "copy-start.1"}
    assert sum(held.values()) == 29000


def test_buffers_have_the_names_of_modules_and_arguments(dump: Path) -> None:
    found = read_assignment(dump, ["weight", "step"])
    arguments = [b for b in found.peak if b.kind == "argument"]
    assert [(b.name, b.bytes, b.module) for b in arguments] == [("weight", 4096, "weight"), ("step", 512, "step")]
    modules = {m.module: m.bytes for m in by_module(found.peak)}
    # The copy, which the compiler added, counts for the module whose result it copies.
    assert modules == {"blocks.0.up": 10000, "blocks.0 (backward)": 19000}


def test_a_refusal_lists_what_would_have_been_largest() -> None:
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
Used 50.85G of 15.75G hbm. Exceeded hbm capacity by 35.10G.

Total hbm usage >= 51.35G:

  Largest program allocations in hbm:

  1. Size: 9.00G
     Operator: op_name="blocks.0.attention/bmm"
     Shape: bf16[12,32,12,1024,1024]{4,3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 9.00G
     XLA label: fusion.10 = fusion(param), kind=kLoop
     Allocation type: HLO temp
     ==========================

  2. Size: 96.0M
     Shape: f32[32768,768]{1,0}
     XLA label: Arg_0.1 = parameter(0)
     Allocation type: Entry argument
"""
    first, second = read_refusal(message)
    assert (first.bytes, first.module, first.shape) == (9 << 30, "blocks.0.attention", "bf16[12,32,12,1024,1024]")
    assert (second.bytes, second.kind) == (96 << 20, "argument")
