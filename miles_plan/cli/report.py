"""`miles-plan report`: the HTML report of a plan or a run, and its Perfetto trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from miles_plan.cli.plan_files import PlanOrRun, plan_of
from miles_plan.diagnostics import PlanError, error

Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where the page goes.")]
Trace = Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Also write a trace for ui.perfetto.dev.")]


def report(path: PlanOrRun, out: Out = None, trace: Trace = None) -> None:
    """Write one self-contained HTML page: of a plan, or of a run as far as it has come.

    A run directory gets report.html, trace.json and measured.json, with planned against measured; a plan a page of its name.
    """
    from miles_plan.report.atomic_file import write_whole
    from miles_plan.report.html import REPORT_NAME, run_html, write_plan_report
    from miles_plan.report.measured import table, write_measured
    from miles_plan.report.perfetto import write_trace
    from miles_plan.report.run_files import read_run

    plan, measured = plan_of(path), None
    page = out or (path / REPORT_NAME if path.is_dir() else path.with_suffix(".html"))
    try:
        if path.is_dir():
            trace = trace or path / "trace.json"
            write_whole(page, run_html(read_run(path)))
            measured, found = write_measured(path)
            sys.stdout.write("".join(f"{line}\n" for line in table(found) if found.memory))
        else:
            write_plan_report(plan, page)
        if trace is not None:
            write_trace(path if path.is_dir() else plan, trace)
    except OSError as problem:
        raise PlanError((error("MP403", f"{problem.filename or page}: {problem.strerror or problem}"),)) from None
    for written in (page, trace, measured):
        if written is not None:
            sys.stdout.write(f"{written}\n")
