"""What the compiler said is kept by all that it depends on, so that no program is compiled twice."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu import ahead, compiled_store
from kernel_pytorch.backends.tpu.buffers import Buffer
from kernel_pytorch.backends.tpu.compiler import Compiled
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.errors import KptError

LOWERED = ahead.Lowered(b"module {}", (), 0)
V5E, V5P = parse_topology("v5e:1"), parse_topology("v5p:1")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The programs that were compiled."""
    seen: list[bytes] = []

    def child(module: str, request: bytes, timeout_s: float) -> Compiled:
        del module, timeout_s
        stablehlo, topology, _ = pickle.loads(request)
        seen.append(stablehlo)
        if stablehlo == b"refused":
            raise KptError("no")
        buffers = (Buffer("fusion.1", 1 << 40, "f32[8]", "blocks.0/mul"),)
        return Compiled(topology.name, fits=True, peak_bytes=len(seen), flops=float("nan"), buffers=buffers)

    monkeypatch.setattr(ahead, "_in_child", child)
    return seen


def test_nothing_is_kept_unless_a_directory_is_named(asked, monkeypatch) -> None:
    monkeypatch.delenv("KPT_TPU_COMPILED", raising=False)
    ahead.compile_lowered(LOWERED, V5E)
    ahead.compile_lowered(LOWERED, V5E)
    assert len(asked) == 2


def test_the_same_question_is_answered_once(asked, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_TPU_COMPILED", str(tmp_path / "kept"))
    first = ahead.compile_lowered(LOWERED, V5E)
    again = ahead.compile_lowered(LOWERED, V5E)
    assert len(asked) == 1
    assert repr(again) == repr(first), "buffers and NaN included"
    assert [p.suffix for p in (tmp_path / "kept").iterdir()] == [".json"]


def test_every_part_of_the_question_counts(asked, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_TPU_COMPILED", str(tmp_path))
    questions = [
        lambda: ahead.compile_lowered(LOWERED, V5E),
        lambda: ahead.compile_lowered(ahead.Lowered(b"module { }", (), 0), V5E),
        lambda: ahead.compile_lowered(LOWERED, V5P),
        lambda: ahead.compile_lowered(LOWERED, V5E, partitions=4),
        lambda: ahead.compile_lowered(LOWERED, V5E, partitions=4, argument_shardings=["{replicated}"]),
        lambda: ahead.compile_lowered(LOWERED, V5E, windows=False),
        lambda: ahead.compile_lowered(LOWERED, V5E, dump=False),
    ]
    answers = [ask().peak_bytes for ask in questions]
    assert answers == list(range(1, len(questions) + 1))
    assert [ask().peak_bytes for ask in questions] == answers
    monkeypatch.setattr(compiled_store.packages, "installation", lambda: compiled_store.packages.Installation())
    monkeypatch.setattr(compiled_store, "_code", lambda: "another reader")
    assert questions[0]().peak_bytes == len(questions) + 1


def test_an_error_is_not_kept_and_a_file_that_is_no_answer_is_told(asked, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_TPU_COMPILED", str(tmp_path))
    refused = ahead.Lowered(b"refused", (), 0)
    for _ in range(2):
        with pytest.raises(KptError, match="no"):
            ahead.compile_lowered(refused, V5E)
    assert len(asked) == 2
    assert list(tmp_path.iterdir()) == []
    ahead.compile_lowered(LOWERED, V5E)
    (place,) = tmp_path.iterdir()
    place.write_text("{}")
    with pytest.raises(KptError, match="is not what the compiler said") as caught:
        ahead.compile_lowered(LOWERED, V5E)
    assert caught.value.fix == f"rm {place}"
