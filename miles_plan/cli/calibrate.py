"""`miles-plan calibrate`: measure this machine's GPUs and write a hardware profile that estimates use."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.cli.console import console
from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.options import AsJson
from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.calibrate.calibration import Calibration

ProfileOut = Annotated[Path, typer.Option("--out", "-o", metavar="PROFILE.json", help="Where the profile goes.")]
Budget = Annotated[float, typer.Option("--seconds", min=5.0, max=3600.0, help="About how long to measure.")]


def calibrate(out: ProfileOut = Path("profile.json"), seconds: Budget = 60.0, as_json: AsJson = False) -> None:
    """Measure the GPUs of this machine in about a minute and write a hardware profile.

    Give it to `compile` and `estimate` with --profile, or name it in the spec as `cluster.profile`. Exit code 0: it is
    written, 1: findings say why there is none, 130: interrupted, and nothing was written.
    """
    _refuse_unwritable(out)
    try:
        from miles_plan.calibrate.calibration import calibrate_machine
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "torch":
            raise
        help = "pip install 'miles-plan[run]'"
        raise PlanError((error("MP423", "`calibrate` needs torch, which is not installed", help=help),)) from None
    try:
        found = calibrate_machine(seconds, _tell)
        _write(out, found.text)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was written\n")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        sys.stdout.write(json.dumps(_as_json(found, out), indent=1) + "\n")
    else:
        _show(found, out)


def _tell(part: str) -> None:
    sys.stderr.write(f"measuring: {part}\n")


def _refuse_unwritable(out: Path) -> None:
    """Said before a minute is spent, not after it."""
    folder = out.parent
    why = "it is a directory" if out.is_dir() else ""
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        why = f"{folder} cannot be written to"
    if why:
        raise PlanError((error("MP101", f"the profile cannot be written to {out}: {why}"),))


def _write(out: Path, text: str) -> None:
    from miles_plan.report.atomic_file import write_whole

    try:
        write_whole(out, text)
    except OSError as problem:
        raise PlanError((error("MP101", f"the profile cannot be written to {out}: {problem.strerror or problem}"),)) from None


def _as_json(found: Calibration, out: Path) -> dict[str, object]:
    return {
        "schema_version": 1,
        "file": str(out),
        "gpu": found.gpu.name,
        "constants": [{"name": each.name, "measured": each.measured, "shipped": each.shipped} for each in found.comparisons()],
    }


def _show(found: Calibration, out: Path) -> None:
    from rich.table import Table

    table = Table("constant", "measured", "shipped", "measured / shipped", title=f"{found.gpu.name}: {found.machine.device}")
    for each in found.comparisons():
        ratio = f"{each.measured / each.shipped:.2f}" if each.shipped else ""
        table.add_row(each.name, f"{each.measured:.4g}", "" if each.shipped is None else f"{each.shipped:.4g}", ratio)
    console().print(table)
    console().print(f"profile written to {out}", highlight=False, markup=False)
