"""`miles-plan doctor`: whether this machine can run a job, point by point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miles_plan.cli.console import console
from miles_plan.cli.exit_code import ExitCode

if TYPE_CHECKING:
    from miles_plan.backends.executor.engine_checks import Combination, EngineState
    from miles_plan.backends.executor.machine_checks import Check

Folder = Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="Where runs would be written.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
MARKS = {"ok": "ok  ", "warning": "warn", "problem": "FAIL"}
ENGINE_MARKS = {"can run": "ok  ", "untested releases": "warn", "missing packages": "no  ", "no GPU": "no  "}


def doctor(run_dir: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """What running needs, which engines can run here, and which releases are known to work together.

    Exit code 1 if something is missing that every run needs.
    """
    from miles_plan.backends.executor.engine_checks import combinations, engine_states
    from miles_plan.backends.executor.machine_checks import gpu_names, machine_checks

    checks = list(machine_checks(run_dir))
    engines = list(engine_states(len(gpu_names())))
    known = list(combinations())
    if as_json:
        typer.echo(json.dumps(_data(checks, engines, known), indent=1))
    else:
        _show(checks, engines, known)
    if any(check.verdict == "problem" for check in checks):
        raise typer.Exit(ExitCode.DIAGNOSTICS)


def _show(checks: Sequence[Check], engines: Sequence[EngineState], known: Sequence[Combination]) -> None:
    for check in checks:
        _line(f"{MARKS[check.verdict]}  {check.subject:<18} {check.found}")
        if check.verdict != "ok" and check.help:
            _line(f"      {check.help}")
    _line("\nEngines")
    for each in engines:
        _line(f"{ENGINE_MARKS[each.state]}  {each.engine:<18} {each.state}: {each.role}")
        for package in each.packages:
            name = package.package.name
            if package.verdict == "missing":
                _line(f"      {name} is missing ({package.package.why}): {package.package.get}")
            elif package.verdict == "other" and each.state == "untested releases":
                _line(f"      {name} {package.found} is installed, {package.seen} was seen to work")
    _line("\nSeen to work together")
    for row in known:
        seen = row.seen
        _line(f"      {' + '.join(dict.fromkeys(seen.engines))}: Python {seen.python}, {seen.source}")
        _line(f"        {', '.join(f'{name} {release}' for name, release in seen.versions)}")
        if row.differences:
            here = ", ".join(f"{name} {found or 'none'}" for name, found, _ in row.differences)
            _line(f"        here instead: {here}")
        for note in seen.notes:
            _line(f"        note: {note}")


def _line(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def _data(checks: Sequence[Check], engines: Sequence[EngineState], known: Sequence[Combination]) -> dict[str, Any]:
    return {
        "checks": [asdict(check) for check in checks],
        "engines": [
            {**asdict(each), "packages": [{**asdict(package), "verdict": package.verdict} for package in each.packages]}
            for each in engines
        ],
        "known_to_work": [asdict(row) for row in known],
    }
