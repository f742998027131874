"""Tell which device tests ran on which TPU runtime, and of every one that could not, why.

    python tests/tpu/report.py out/tpu/torch_tpu.xml out/tpu/torch_xla.xml

reads what `pytest --junitxml` wrote, one file a runtime, named after it.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Result", "counts", "render", "results_of"]

RAN, FAILED, SKIPPED = "ran", "failed", "could not"
_WHOLE_FILE = re.compile(r"^\('.*', \d+, [\"']Skipped: (.*)[\"']\)$")
"""Where pytest writes why it skipped a file as a whole: its message says only that it did."""


@dataclass(frozen=True)
class Result:
    """One test on one runtime.

    Attributes:
        place: The test's file.
        name: Its name, with parameters.
        outcome: `ran`, `failed` or `could not`.
        reason: Why it could not, or how it failed: one line.
    """

    place: str
    name: str
    outcome: str
    reason: str = ""


def results_of(path: Path) -> list[Result]:
    """Return the results in a JUnit file."""
    return [_result(case) for case in ET.parse(path).iter("testcase")]


def render(runtimes: Mapping[str, list[Result]]) -> str:
    """Return the table of all files, and the list of the tests that could not run, by runtime and reason."""
    if not runtimes:
        return "No test ran on a TPU runtime.\n"
    lines = [f"| device tests | {' | '.join(runtimes)} |", f"|---|{'---|' * len(runtimes)}"]
    places = sorted({result.place for results in runtimes.values() for result in results})
    for place in places:
        cells = [_counts([r for r in results if r.place == place]) for results in runtimes.values()]
        lines.append(f"| {place} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(_counts(results) for results in runtimes.values())} |")
    for runtime, results in runtimes.items():
        for outcome, title in ((FAILED, "Failed"), (SKIPPED, "Could not run")):
            reasons: dict[str, list[Result]] = defaultdict(list)
            for result in results:
                if result.outcome == outcome:
                    reasons[result.reason].append(result)
            if reasons:
                lines += ["", f"{title} on {runtime}:", ""]
            for reason, which in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
                lines.append(f"- {reason or 'no reason given'}")
                by_place: dict[str, list[str]] = defaultdict(list)
                for result in which:
                    by_place[result.place].append(result.name)
                for place, names in sorted(by_place.items()):
                    whole = len(names) > 1 and len(names) == sum(r.place == place for r in results)
                    lines.append(f"  - {place}: {f'all {len(names)}' if whole else ', '.join(names)}")
    return "\n".join(lines) + "\n"


def counts(results: list[Result]) -> dict[str, int]:
    """Return how many tests ran, failed and could not run."""
    outcomes = [result.outcome for result in results]
    return {name: outcomes.count(name) for name in (RAN, FAILED, SKIPPED)}


def _result(case: ET.Element) -> Result:
    place, name = _place(case.get("classname", "")), case.get("name", "")
    if not place:  # a file that was skipped as a whole has its module as name
        place, name = _place(name), "all of it"
    for tag, outcome in (("failure", FAILED), ("error", FAILED), ("skipped", SKIPPED)):
        told = case.find(tag)
        if told is not None:
            words = (told.get("message") or told.text or "").strip().splitlines()
            whole = _WHOLE_FILE.search(told.text or "")
            return Result(place, name, outcome, whole[1] if whole else words[0] if words else "")
    return Result(place, name, RAN)


def _place(module: str) -> str:
    parts = module.split(".")
    while parts and parts[-1][:1].isupper():  # a class of tests
        parts.pop()
    return f"{'/'.join(parts)}.py" if parts and parts != [""] else ""


def _counts(results: list[Result]) -> str:
    if not results:
        return "-"
    return ", ".join(f"{count} {outcome}" for outcome, count in counts(results).items() if count)


def main(arguments: list[str]) -> int:
    """Print the report of the given files."""
    if not arguments:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    sys.stdout.write(render({Path(a).stem: results_of(Path(a)) for a in arguments}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
