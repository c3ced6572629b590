"""`miles-plan run`: compile, then execute; a plan file is executed exactly as it was reviewed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.cli.options import Sets
from miles_plan.cli.running import carry_out, need_packages
from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.ir.plan import Plan

SpecOrPlan = Annotated[str, typer.Argument(metavar="SPEC_OR_PLAN", help="A job spec, or a plan file that `compile` wrote.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Folder of the run; new, or empty.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Short for --set seed=N.")]


def run(source: SpecOrPlan, run_dir: RunDir = None, sets: Sets = None, seed: Seed = None) -> None:
    """Run a job on this machine: Ray, engines, checkpoints, metrics, and a report at the end.

    Exit code 0: finished, 1: mistakes found before anything started, 4: failed and `resume` can continue, 5: failed and cannot,
    130: interrupted. Ctrl-C once finishes the step and saves; twice stops at once.
    """
    need_packages()
    overrides = [*(sets or []), *([f"seed={seed}"] if seed is not None else [])]
    plan = _reviewed_plan(Path(source), overrides) if is_plan(Path(source)) else _compiled(source, overrides)
    root = run_dir or Path("runs") / f"{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"

    from miles_plan.backends.executor.run import execute

    carry_out(lambda: execute(plan, root), root)


def is_plan(path: Path) -> bool:
    """Whether a file is a plan and not a spec: JSON with a plan's outer keys."""
    if path.suffix != ".json":
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # reading it as a plan says what is wrong
    return not isinstance(data, dict) or "schema_version" in data


def _reviewed_plan(path: Path, overrides: list[str]) -> Plan:
    """The plan in the file. PlanError where it cannot be used; a plan takes no overrides."""
    from miles_plan.ir.plan import PlanFileError, read_plan

    if overrides:
        raise typer.BadParameter(f"{path} is a plan, which runs as it was reviewed; overrides are for specs: compile again")
    try:
        return read_plan(path)
    except PlanFileError as problem:
        raise PlanError((error("MP442", str(problem)),)) from None


def _compiled(source: str, overrides: list[str]) -> Plan:
    from miles_plan.cli.compile import compiled_job

    return compiled_job(source, overrides, []).plan
