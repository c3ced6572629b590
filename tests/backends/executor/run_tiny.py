"""The driver of a tiny run as a process of its own, so that tests can kill it: `python -m ...run_tiny RUN_DIR OPTIONS`.

OPTIONS is JSON for `tiny_plan`; a folder that holds a run is resumed. Exit codes are those of the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from miles_plan.backends.executor.run import execute, resume
from miles_plan.cli.running import carry_out
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from tests.backends.executor.tiny_plans import tiny_plan


def main(root: Path, options: str) -> None:
    """Run or resume."""
    given = json.loads(options)
    for name, kind in (("train", TrainLayout), ("rollout", RolloutLayout)):
        if name in given:
            given[name] = kind(**given[name])
    carry_out(lambda: resume(root) if (root / "run.json").exists() else execute(tiny_plan(**given), root), root)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
