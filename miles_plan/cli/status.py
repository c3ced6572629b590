"""`miles-plan status`: what a run is doing, whether that is normal, and what comes next."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.cli.console import console
from miles_plan.cli.options import AsJson
from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.backends.executor.status import RunStatus

RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]


def status(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Look at a run, alive or not, without touching it."""
    from miles_plan.backends.executor.run_directory import RunDirectoryError
    from miles_plan.backends.executor.status import read_status

    try:
        found = read_status(run_dir)
    except RunDirectoryError as problem:
        raise PlanError((error("MP506", str(problem)),)) from None
    if as_json:
        tasks = [{**asdict(task), "verdict": task.verdict} for task in found.tasks]
        sys.stdout.write(json.dumps({**asdict(found), "tasks": tasks}, indent=1, default=str) + "\n")
        return
    out = console()
    for line in status_lines(found, run_dir):
        out.print(line, markup=False, soft_wrap=True)


def status_lines(found: RunStatus, run_dir: Path) -> list[str]:
    """The status as text."""
    who = f" (process {found.owner['pid']} on {found.owner['host']}, since {found.owner['since']})" if found.owner else ""
    lines = [f"{found.name}: {found.phase}{who}"]
    lines += [f"  {loop.name:<12} {loop.done} of {loop.iterations} iterations" for loop in found.loops]
    if found.remaining_s is not None:
        lines.append(f"  about {found.remaining_s:.0f} s to go")
    for task in found.tasks:
        usual = f", usually {task.usual_s:.2f} s" if task.usual_s is not None else ""
        lines.append(f"  now   {task.instance}: {task.waits_for} for {task.age_s:.1f} s{usual}: {task.verdict}")
    if found.next and found.phase == "running":
        lines.append(f"  next  {', '.join(found.next)}")
    shown = [
        f"{key} {found.latest[key]:.4g}" for key in ("reward_mean", "loss", "max_abs_log_prob_diff") if key in found.latest
    ]
    if shown:
        lines.append(f"  last  {found.latest['loop']} {found.latest['iteration'] + 1}: {', '.join(shown)}")
    lines.append(f"  newest checkpoint {found.newest_checkpoint or 'none'}, restarts {found.restarts}")
    if found.last_problem:
        lines.append(f"  last problem  {found.last_problem}")
    if found.phase in ("killed", "interrupted", "failed"):
        lines.append(f"  continue with: miles-plan resume {run_dir}")
    return lines
