"""`miles-plan validate`: hold the estimates against files of published or measured figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.options import AsJson
from miles_plan.diagnostics import PlanError, error

RowFiles = Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSONL files of figures, one row a line.")]
Runs = Annotated[
    list[Path] | None,
    typer.Option("--run", metavar="FILE", help="A run's measured.json, or a result of benchmarks.engines; may be given again."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write the tables as Markdown.")]


def validate(files: RowFiles, as_json: AsJson = False, runs: Runs = None, out: Out = None) -> None:
    """Estimate every row that states its layout, and print the error by kind and source and how many intervals held.

    Rows are published figures, measured Megatron runs or launch configurations; what cannot be mapped is counted with its
    reason. Exit code 0: enough rows were mapped, 1: fewer than 90 % of those that state their layout, or a file cannot be read.
    """
    from miles_plan.cost.validate import load_rows
    from miles_plan.cost.validate import validate as compare
    from miles_plan.report.gpu_runs import gpu_runs_table, read_gpu_run

    rows = []
    for file in files:
        try:
            rows += load_rows(file)
        except (OSError, UnicodeDecodeError, ValueError) as problem:
            raise PlanError((error("MP443", f"{file} is no file of rows: {problem}"),)) from None
    executed = []
    for file in runs or ():
        try:
            executed.append(read_gpu_run(file))
        except (OSError, UnicodeDecodeError, ValueError) as problem:
            raise PlanError((error("MP443", f"{file} is no comparison of a run with its plan: {problem}"),)) from None
    report = compare(rows)
    page = report.markdown() + (f"\n\n## Runs on our engines\n\n{gpu_runs_table(executed)}" if executed else "") + "\n"
    if out is not None:
        out.write_text(page, encoding="utf-8")
    sys.stdout.write(json.dumps({**report.to_json(), "runs": executed}, indent=1) + "\n" if as_json else page)
    if not report.ok:
        raise typer.Exit(ExitCode.DIAGNOSTICS)
