"""The page's text: template, data and charting library joined into one string."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from kernel_pytorch.core.types import Plan
from kernel_pytorch.report import figures, reading

__all__ = ["page"]


def page(plan: Plan, *, directory: str) -> str:
    """Return the report of a plan as one HTML document.

    Args:
        plan: The plan.
        directory: Where the plan lies, for the commands the page shows.
    """
    environment = Environment(
        loader=PackageLoader("kernel_pytorch.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        plan=plan, figures=figures, reading=reading, commands=reading.next_commands(plan, directory)
    )
