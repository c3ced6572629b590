"""`miles-plan resume`: continue a run after any end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miles_plan.cli.running import carry_out, need_packages

RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]


def resume(run_dir: RunFolder) -> None:
    """Continue a run from its newest good checkpoint, with the plan it began with.

    The result is that of an uninterrupted run: with the embedded engines, bit for bit. Exit codes as for `run`.
    """
    need_packages()
    from miles_plan.backends.executor.run import resume as resume_run

    carry_out(lambda: resume_run(run_dir), run_dir)
