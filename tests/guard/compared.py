"""Comparisons made by hand, for the tests of what shows and stores them."""

from __future__ import annotations

from typing import Any

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts

HOSTILE = (
    "a|b `code` ``two`` <script>alert(1)</script> </details> <!-- kpt --> @octocat #1 GH-2 [x](javascript:1) "
    '"quoted" \\ http://evil.example www.evil.example *bold* \x1b[31mred\x00\n| new | row |\r\n# title\u202e'
)


def comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "kind": "compare",
        "name": "resnet step",
        "verdict": Verdict.FAIL,
        "reason": "slower by 11.2 % (10.1 % to 12.4 %), 3 % are allowed",
        "max_slowdown": 0.03,
        "change": Ratio(1.112, 1.101, 1.124, 0.99),
        "base": SideFacts("base", revision="a" * 40, software={"torch": "2.12.1", "python": "3.11.9"}),
        "head": SideFacts("head", revision="b" * 40, dirty=True, software={"torch": "2.13.0", "python": "3.11.9"}),
        "base_samples_ms": (10.0, 10.2, 9.8),
        "head_samples_ms": (11.1, 11.3, 11.0),
        "culprits": (Culprit("software", "torch 2.12.1 -> 2.13.0", 0.61, {"ms": 0.7}),),
        "notes": ("head is noisier: CV 4 % over 1 %",),
        "created": "2026-05-04T03:02:01+00:00",
        "command": "kpt compare model.py:workload --base aaaa --head bbbb",
        "seconds": 12.5,
        "id": "0123",
    }
    return Comparison(**{**values, **changes})


def passing(**changes: Any) -> Comparison:
    values = {
        "verdict": Verdict.PASS,
        "reason": "not slower",
        "change": Ratio(0.999, 0.99, 1.01, 0.99),
        "culprits": (),
        "notes": (),
        "id": "4567",
        "name": "bert",
    }
    return comparison(**{**values, **changes})
