"""Runs on real engines, each a line: how far memory and step time lay from its plan.

Read from what `python -m benchmarks.engines` leaves (`planned_against_measured` beside the spec's name), or from a run
directory's measured.json. A run that had other work beside it (`beside_others`) bounds its time from above and says no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_plan.report.measured import WHOLE_STEP
from miles_plan.report.units import seconds_text

HEADER = ("run", "memory of a phase, measured over planned", "step planned", "step measured", "difference")


def read_gpu_run(path: Path) -> dict[str, Any]:
    """One run's file. ValueError where it holds no comparison, OSError where it cannot be read."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = data.get("planned_against_measured", data) if isinstance(data, dict) else {}
    if not isinstance(found.get("memory"), list) or not isinstance(found.get("times"), list):
        raise ValueError("no comparison of a run with its plan; expected `memory` and `times`")
    about = {
        "run": data.get("spec", path.parent.name),
        "note": data.get("note", ""),
        "beside_others": bool(data.get("beside_others")),
    }
    return {**about, "memory": found["memory"], "times": found["times"]}


def gpu_runs_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table, and the notes below it."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(_cells(run)) + " |" for run in runs]
    notes = [f"- {run['run']}: {run['note']}" for run in runs if run["note"]]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _cells(run: Mapping[str, Any]) -> list[str]:
    phases = [f"{row['phase']} {row['error']:+.1%}" for row in run["memory"]]
    steps = [row for row in run["times"] if row["task"] == WHOLE_STEP and row["runs"] > 1]
    step = steps[-1] if steps else None
    times = ["", "", ""]
    if step:
        took = seconds_text(step["median_s"])
        alone = not run["beside_others"]
        times = [
            seconds_text(step["planned_s"]),
            took if alone else f"at most {took}",
            f"{step['error']:+.1%}" if alone else "",
        ]
    return [run["run"], ", ".join(phases) or "not measured apart", *times]
