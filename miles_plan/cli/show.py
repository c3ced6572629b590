"""`miles-plan show`: a plan or a run in the terminal."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from miles_plan.cli.options import AsJson
from miles_plan.cli.plan_files import PlanOrRun, run_or_plan_of

Everything = Annotated[bool, typer.Option("--all", help="Show every section and every row.")]
SectionNames = Annotated[
    list[str] | None, typer.Option("--section", metavar="NAME", help="Show one section of a plan. May be repeated.")
]


def show(path: PlanOrRun, section: SectionNames = None, everything: Everything = False, as_json: AsJson = False) -> None:
    """Show a plan, or how far a run has come: results, curves, planned against measured, events, files.

    With --section the plan that a run executes is shown.
    """
    from miles_plan.cli.console import console
    from miles_plan.ir.plan import Plan, to_json
    from miles_plan.report.terminal import SECTIONS, render_plan, render_run

    if unknown := [name for name in section or () if name not in SECTIONS]:
        raise typer.BadParameter(f"no section '{unknown[0]}'; sections are {', '.join(SECTIONS)}")
    found = run_or_plan_of(path)
    plan = found if isinstance(found, Plan) else found.plan
    if as_json:
        sys.stdout.write(json.dumps(to_json(plan), indent=1, ensure_ascii=False) + "\n")
    elif isinstance(found, Plan) or section:
        render_plan(plan, console(), sections=section, full=everything)
    else:
        render_run(found, console(), full=everything)
