"""The HTML report of a plan or a run: one file with everything in it, that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from miles_plan.ir.plan import Plan
from miles_plan.report.atomic_file import write_whole
from miles_plan.report.html_filters import FILTERS
from miles_plan.report.plan_view import plan_view
from miles_plan.report.printable import printable_lines
from miles_plan.report.run_files import RunRecord, read_run
from miles_plan.report.run_view import run_view

REPORT_NAME = "report.html"


def write_plan_report(plan: Plan, path: Path) -> None:
    """Write the report of a plan. OSError names the path."""
    write_whole(path, plan_html(plan))


def write_run_report(run_dir: Path) -> Path:
    """Write the report of a run into its directory, as far as the run has come, and return its path.

    PlanFileError if the directory holds no plan.json; whatever else is missing is left out of the report.
    """
    path = run_dir / REPORT_NAME
    write_whole(path, run_html(read_run(run_dir)))
    return path


def plan_html(plan: Plan) -> str:
    """The report of a plan as text."""
    return _render("plan.html", plan_view(plan))


def run_html(record: RunRecord) -> str:
    """The report of a run as text."""
    return _render("run.html", run_view(record))


def _render(template: str, view: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("miles_plan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    style, script = (_text_of(environment, name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only our script may run, by its digest: were a name ever to escape into markup, the browser would still not obey it.
    return environment.get_template(template).render(
        view, style=Markup(style), script=Markup(script), script_sha256=Markup(digest)
    )


def _text_of(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _shown(value: object) -> object:
    """What a template writes: text with control characters written out; markup as it is."""
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value
