"""`miles-plan check`: every mistake at once, without torch and without running anything of the user's."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.findings import show_findings
from miles_plan.cli.options import FindingsFormat, OutputFormat, Sets
from miles_plan.diagnostics import Diagnostic, PlanError

SpecFiles = Annotated[list[str], typer.Argument(metavar="SPEC...", help="One or more job specs.")]


def check(specs: SpecFiles, sets: Sets = None, format: FindingsFormat = OutputFormat.FULL) -> None:
    """Check job specs and show every mistake with its place.

    Reads the files, their layers and overrides, the fields, the rules between them, whether the models, GPUs, files and
    rewards that they name exist, and whether a plan can be made of it all. Exit code 0: fine (there may be warnings), 1:
    mistakes, 2: wrong usage or a bug of ours.
    """
    found: list[Diagnostic] = []
    sources: dict[str, str] = {}
    fine: list[str] = []
    for spec in specs:
        diagnostics, texts = findings_of(spec, sets or [])
        found += diagnostics
        sources |= texts
        if not diagnostics:
            fine.append(spec)
    status = show_findings(dict.fromkeys(found), sources, format, sys.stdout)
    if format is OutputFormat.FULL:
        sys.stdout.write("".join(f"{spec}: no mistakes found\n" for spec in fine))
    if status is not ExitCode.FINE:
        raise typer.Exit(status)


def findings_of(spec: str, sets: list[str]) -> tuple[list[Diagnostic], dict[str, str]]:
    """All findings about one spec, and the texts of the files they point into."""
    from miles_plan.spec import load_job
    from miles_plan.spec.named_things import named_things

    try:
        loaded = load_job(spec, sets)
    except PlanError as problem:
        return list(problem.diagnostics), dict(problem.sources)
    found = list(named_things(loaded))
    if any(each.severity == "error" for each in found):
        return found, dict(loaded.sources)  # the passes need models and GPUs that exist
    from miles_plan.passes.compile import compile_job

    try:
        found += compile_job(loaded).diagnostics
    except PlanError as problem:
        found += problem.diagnostics
    return found, dict(loaded.sources)
