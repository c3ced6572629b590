"""`miles-plan diff`: what differs between two plans."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.options import AsJson
from miles_plan.cli.plan_files import plan_of

Before = Annotated[Path, typer.Argument(metavar="BEFORE", help="A plan file, a run directory, or a job spec to compile.")]
After = Annotated[Path, typer.Argument(metavar="AFTER", help="The same, to compare with.")]
Everything = Annotated[bool, typer.Option("--all", help="Show every change, and long values whole.")]


def diff(before: Before, after: After, as_json: AsJson = False, everything: Everything = False) -> None:
    """Compare two plans: decisions, layouts, tasks, memory, estimates with their changes. Exit code 0: same, 3: they differ."""
    from miles_plan.cli.console import console
    from miles_plan.report.compare import compare_plans, to_data
    from miles_plan.report.terminal import render_difference

    comparison = compare_plans(plan_of(before), plan_of(after))
    if as_json:
        sys.stdout.write(json.dumps(to_data(comparison), indent=1, ensure_ascii=False) + "\n")
    else:
        render_difference(comparison, console(), full=everything)
    if not comparison.same:
        raise typer.Exit(ExitCode.PLANS_DIFFER)
