"""Write a plan for `nets.py:net` of this directory: `python make_plan.py DIR bf16|aoti|none [FIELD=VALUE ...]`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from plans import plan, trial

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import signatures_of
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.core.types import Step
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.schema import dumps


def main(directory: str, kind: str, *changes: str) -> None:
    workload = load_target("nets.py:net")
    steps = {"bf16": [Step("dtype", {"to": "bfloat16", "how": "cast"})], "aoti": [Step("aoti")]}.get(kind, [])
    made = plan()
    spec = replace(
        made.workload,
        fingerprint=fingerprint(workload.model()),
        signatures={"main": signatures_of(workload.call("main", 0))},
    )
    made = replace(
        made, workload=spec, device=detect(), chosen=trial(*steps, phase="confirm"), config={"mode": "inference"}
    )
    raw = json.loads(dumps(made))
    for change in changes:
        path, _, value = change.partition("=")
        *parents, last = path.split(".")
        node = raw
        for parent in parents:
            node = node[parent]
        node[last] = json.loads(value)
    target = Path(directory)
    target.mkdir(exist_ok=True)
    (target / "plan.json").write_text(json.dumps(raw))


if __name__ == "__main__":
    main(*sys.argv[1:])
