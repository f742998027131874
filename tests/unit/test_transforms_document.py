"""The example of docs/adding-a-transform.md works as it is printed there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kernel_pytorch.core.protocols import Transform

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-transform.md"


def test_the_documents_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_pytorch.transforms

    code, test = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (tmp_path / "drop_dropout.py").write_text(code)
    monkeypatch.setattr(kernel_pytorch.transforms, "__path__", [*kernel_pytorch.transforms.__path__, str(tmp_path)])
    names: dict[str, object] = {}
    exec(compile(test, "test_transforms_drop_dropout.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()  # type: ignore[operator]
    assert isinstance(names["DropDropout"](), Transform)  # type: ignore[operator]
    monkeypatch.delitem(sys.modules, "kernel_pytorch.transforms.drop_dropout")
