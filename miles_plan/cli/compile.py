"""`miles-plan compile` and `miles-plan estimate`: the plan, as a table, as JSON, as a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.cli.console import console
from miles_plan.cli.findings import show_findings
from miles_plan.cli.options import AsJson, ProfileFile, Sets, SpecFile, profile_override
from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.passes.base import Instrument
    from miles_plan.passes.compile import Compiled

Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the plan file goes.")]
PrintAfterNames = Annotated[
    list[str] | None, typer.Option("--print-after", metavar="PASS", help="Print the graph after a pass, or `all`.")
]
DiffAfterNames = Annotated[
    list[str] | None, typer.Option("--diff-after", metavar="PASS", help="Print what a pass changed, or `all`.")
]
TimeThem = Annotated[bool, typer.Option("--time-passes", help="Print how long each pass took.")]
Everything = Annotated[bool, typer.Option("--all", help="Show every section of the plan.")]


def compile(
    spec: SpecFile,
    sets: Sets = None,
    profile: ProfileFile = None,
    out: Out = Path("plan.json"),
    as_json: AsJson = False,
    print_after: PrintAfterNames = None,
    diff_after: DiffAfterNames = None,
    time_passes: TimeThem = False,
    everything: Everything = False,
) -> None:
    """Compile a job spec: placement, memory, step timeline and decisions with their reasons. Writes the plan file.

    Nothing is run and no engine is imported. Exit code 0: there is a plan, 1: findings say why there is none.
    """
    from miles_plan.ir.plan import to_json, write_plan
    from miles_plan.passes.instruments import DiffAfter, PrintAfter, TimePasses
    from miles_plan.report.terminal import render_plan

    timer = TimePasses()
    names = _known_passes([*(print_after or []), *(diff_after or [])])
    instruments: list[Instrument] = [
        timer,
        PrintAfter(frozenset(print_after or []) & names, sys.stdout.write),
        DiffAfter(frozenset(diff_after or []) & names, sys.stdout.write),
    ]
    compiled = compiled_job(spec, [*(sets or []), *profile_override(profile)], instruments)
    try:
        write_plan(compiled.plan, out)
    except OSError as problem:
        raise PlanError((error("MP101", f"the plan cannot be written to {out}: {problem.strerror or problem}"),)) from None
    if as_json:
        sys.stdout.write(json.dumps(to_json(compiled.plan), indent=1, ensure_ascii=False) + "\n")
    elif not (print_after or diff_after):
        render_plan(compiled.plan, console(), full=everything)
        console().print(f"plan written to {out}", highlight=False, markup=False)
    if time_passes:
        sys.stdout.write(timer.text())


def estimate(spec: SpecFile, sets: Sets = None, profile: ProfileFile = None, as_json: AsJson = False) -> None:
    """Memory and time only, each figure as an interval with its basis and terms. Writes nothing."""
    from miles_plan.report.terminal import render_plan

    compiled = compiled_job(spec, [*(sets or []), *profile_override(profile)], [])
    if as_json:
        figures = [
            {
                "name": each.name,
                "unit": each.unit,
                "low": each.low,
                "mid": each.mid,
                "high": each.high,
                "basis": each.basis,
                "terms": dict(each.terms),
            }
            for each in compiled.plan.estimates
        ]
        sys.stdout.write(json.dumps({"schema_version": 1, "name": compiled.plan.name, "estimates": figures}, indent=1) + "\n")
        return
    render_plan(compiled.plan, console(), sections=("estimates", "memory", "steps"))


def compiled_job(spec: str, sets: list[str], instruments: list[Instrument]) -> Compiled:
    """Load and compile; warnings go to standard error, mistakes are raised as PlanError."""
    from miles_plan.passes.compile import compile_job
    from miles_plan.spec import load_job
    from miles_plan.spec.named_things import named_things

    loaded = load_job(spec, sets)
    named = tuple(named_things(loaded))
    if any(each.severity == "error" for each in named):
        raise PlanError(named, loaded.sources)
    compiled = compile_job(loaded, instruments=instruments)
    if named or compiled.diagnostics:
        show_findings([*named, *compiled.diagnostics], loaded.sources)
    return compiled


def _known_passes(asked: list[str]) -> frozenset[str]:
    """The names that passes have; a usage error for one that none has."""
    from miles_plan.passes.pipeline import DEFAULT

    known = [each.name for each in DEFAULT]
    for name in asked:
        if name not in (*known, "all"):
            raise typer.BadParameter(f"no pass '{name}'; passes are {', '.join(known)}")
    return frozenset(asked)
