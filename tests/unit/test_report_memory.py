"""The report's section on memory: what the compiler said and what was measured, of the memory that one device has."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from plan_factory import COMPILE, make_bare_plan, make_device, make_measurement, make_plan
from rich.console import Console
from test_report_html import EVIL, render

from kernel_pytorch.core.step_memory import ModuleMemory, StepMemory, Whose
from kernel_pytorch.core.types import Candidate, Status, Trial
from kernel_pytorch.plan.schema import dumps, loads
from kernel_pytorch.report.json import explain
from kernel_pytorch.report.text import render_plan

GIB = 1 << 30
PARTS = {"parameters": 1 * GIB, "optimizer": 2 * GIB, "temporaries": 5 * GIB}


def unmodified(**changes) -> StepMemory:
    told = StepMemory(
        Whose.UNMODIFIED, "v5e:1", "main", fits=True, peak_bytes=8 * GIB, capacity_bytes=16 * GIB, parts=PARTS
    )
    return replace(told, **changes)


def tpu_plan(*memory: StepMemory):
    device = replace(make_device(verified=False), vendor="tpu", name="TPU v5e", arch="v5e")
    return make_plan(device=device, memory=memory)


def chosen() -> StepMemory:
    modules = (ModuleMemory("blocks.0.mlp", GIB // 2), ModuleMemory("head", GIB // 4))
    return unmodified(whose=Whose.CHOSEN, peak_bytes=4 * GIB, parts={**PARTS, "temporaries": GIB}, modules=modules)


def printed(plan) -> str:
    stream = io.StringIO()
    render_plan(plan, Console(file=stream, width=120))
    return " ".join(stream.getvalue().split())


def bars(page) -> list[dict]:
    return [a for a in page.all("div") if a.get("class") == "membar"]


def widths(page) -> list[str]:
    return [a["style"].split(";")[0] for a in page.all("i") if "background" in (a.get("style") or "")]


def test_both_steps_are_drawn_to_the_scale_of_the_devices_memory(tmp_path):
    page = render(tpu_plan(unmodified(), chosen()), tmp_path)
    assert bars(page)[0]["aria-label"] == "parameters 1.00 GiB, optimizer 2.00 GiB, temporaries 5.00 GiB"
    assert widths(page)[:6] == [f"width:{w}%" for w in (6.25, 12.5, 31.25, 6.25, 12.5, 6.25)]
    for told in (
        "By the compiler, for v5e:1",
        "unverified on hardware",
        "unmodified fits: 8.00 GiB of 16.0 GiB (50 %)",
        "chosen: dtype(bfloat16) + compile(default) fits: 4.00 GiB of 16.0 GiB (25 %)",
        "Temporaries of the chosen step at its peak",
        "blocks.0.mlp 512 MiB",
        "Measured on TPU v5e",
        "Unverified: the contract suite has not run on this kind of hardware.",
    ):
        assert told in page.text


def test_what_does_not_fit_is_drawn_beyond_the_line(tmp_path):
    refused = unmodified(fits=False, peak_bytes=0, needed_bytes=64 * GIB, parts={}, reason="RESOURCE_EXHAUSTED: HBM")
    page = render(tpu_plan(refused, chosen()), tmp_path)
    assert "does not fit: needs 64.0 GiB of 16.0 GiB: RESOURCE_EXHAUSTED: HBM" in page.text
    lines = [a["style"] for a in page.all("b") if a.get("style")]
    assert lines[:2] == ["left:25.0%", "left:25.0%"], "bars below each other have one scale"
    assert widths(page)[0] == "width:100.0%"


def test_a_compiler_that_does_not_answer_is_told_with_its_reason(tmp_path):
    page = render(tpu_plan(unmodified(fits=None, peak_bytes=0, parts={}, reason=f"jax is missing {EVIL}")), tmp_path)
    assert "unmodified not known: jax is missing" in page.text
    assert page.all("img") == []
    assert len(bars(page)) == 2, "only those of what was measured"


def test_steps_that_only_compile_leave_the_program_as_it_is(tmp_path):
    trial = Trial(Candidate((COMPILE,)), Status.OK, measurement=make_measurement(2.5), phase="confirm")
    same = "how the step is compiled, not what it computes"
    plan = replace(tpu_plan(unmodified()), evidence=(trial,), chosen=trial)
    assert same in render(plan, tmp_path).text
    assert same not in render(tpu_plan(unmodified(), chosen()), tmp_path).text


def test_measured_memory_alone_is_shown_and_none_is_no_section(tmp_path):
    page = render(make_plan(), tmp_path)
    assert len(bars(page)) == 2
    assert "unmodified 176 MiB of 16.0 GiB (1.1 %)" in page.text
    assert "chosen: dtype(bfloat16) + compile(default) 98.0 MiB of 16.0 GiB (0.6 %)" in page.text
    assert "By the compiler" not in page.text
    bare = render(make_bare_plan(), tmp_path)
    assert not [a for a in bare.all("section") if a.get("id") == "fit"]


def test_memory_of_an_emulated_device_is_said_to_be_the_hosts(tmp_path):
    plan = make_plan(device=replace(make_device(verified=False), vendor="tpu", arch="emulated"))
    assert "Under emulation it says nothing about a chip." in render(plan, tmp_path).text


@pytest.mark.parametrize("memory", [(), (unmodified(), unmodified(whose=Whose.CHOSEN, fits=None))])
def test_it_travels_with_the_plan(memory):
    plan = make_plan(memory=memory)
    assert loads(dumps(plan)).memory == memory


def test_a_plan_of_before_has_none():
    raw = json.loads(dumps(make_plan()))
    del raw["memory"]
    assert loads(json.dumps(raw)).memory == ()


def test_text_and_json_tell_it_too():
    plan = tpu_plan(unmodified(), chosen())
    said = printed(plan)
    assert "unmodified fits: 8.00 GiB of 16.0 GiB (50 %); by the compiler for v5e:1, unverified on hardware" in said
    first, second = explain(plan)["memory"]
    assert (first["whose"], first["peak_bytes"], first["verified"]) == ("unmodified", 8 * GIB, False)
    assert second["modules"] == {"blocks.0.mlp": GIB // 2, "head": GIB // 4}
    assert explain(make_plan())["memory"] == []
    silent = printed(tpu_plan(unmodified(fits=None, peak_bytes=0, parts={}, reason="no compiler")))
    assert "memory unmodified not known: no compiler" in silent
    assert "by the compiler" not in silent
