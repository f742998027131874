"""Series that were taken elsewhere: files that are none, and what is judged."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.compare import compare_series
from kernel_pytorch.guard.series import SeriesError, read_series

RNG = random.Random(0)
BASE = [100.0 * RNG.lognormvariate(0.0, 0.01) for _ in range(60)]
SLOWER = [1.2 * 100.0 * RNG.lognormvariate(0.0, 0.01) for _ in range(60)]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is not JSON"),
        ("[1.0, 2.0", "is not JSON"),
        ("{}", "holds an object"),
        ('"abc"', "holds a string"),
        ("12", "holds a number"),
        ("null", "holds null"),
        ("[" * 100_000, "is not JSON"),
        ([1.0] * 20 + ["2.0"], r"sample 20 .* '2\.0'"),
        ([1.0, None], "sample 1 .* None"),
        ([1.0, True], "sample 1 .* True"),
        ([[1.0, 2.0]], "sample 0 .* an array"),
        ([1.0, 0], "sample 1 .* 0, expected a positive"),
        ([1.0, -3], "sample 1 .* -3"),
        ("[1.0, NaN]", "sample 1 .* nan"),
        ("[1.0, Infinity]", "sample 1 .* inf"),
        ([], "has 0 samples, too few"),
        ([1.0] * 9, "has 9 samples, too few"),
    ],
)
def test_what_is_no_series_is_refused_with_its_file(content: object, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "base.json", content)
    with pytest.raises(SeriesError, match=why) as caught:
        read_series(path)
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="no file"):
        read_series(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(SeriesError, match="cannot be read"):
            read_series(path)


def test_paired_series_are_judged(tmp_path: Path) -> None:
    base, head = write(tmp_path / "a.json", BASE), write(tmp_path / "b.json", SLOWER)
    found = compare_series(base, head, paired=True, command="kpt compare ...")
    assert found.verdict is Verdict.FAIL
    assert found.change is not None
    assert found.change.low > 1.1
    assert (found.kind, found.name, found.paired) == ("compare", "b", True)
    assert (found.base.label, found.head.label) == (str(base), str(head))
    assert found.base_samples_ms == tuple(BASE)
    assert compare_series(head, base, paired=True).verdict is Verdict.PASS
    assert compare_series(BASE, BASE, paired=True, name="same").name == "same"


def test_pairs_need_the_same_number() -> None:
    with pytest.raises(SeriesError, match=r"60 samples and .* 59"):
        compare_series(BASE, BASE[1:], paired=True)


def test_series_that_were_not_taken_side_by_side_say_how_to_take_them() -> None:
    found = compare_series([x * (1.0 + i / 100) for i, x in enumerate(BASE)], BASE)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert not found.paired
    assert "side by side" in found.reason
