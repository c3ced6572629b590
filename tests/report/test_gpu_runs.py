"""Runs on real engines beside their plans, as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_plan.report.gpu_runs import gpu_runs_table, read_gpu_run
from miles_plan.report.measured import WHOLE_STEP

MEMORY = {"phase": "train", "planned_bytes": 100, "measured_bytes": 103, "error": 0.03}
STEP = {"loop": "rl", "task": WHOLE_STEP, "planned_s": 2.0, "median_s": 1.5, "error": -0.25, "runs": 8}


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_run_is_a_line_with_its_memory_and_its_last_loops_step(tmp_path: Path) -> None:
    warm = {**STEP, "loop": "warm_start", "planned_s": 1.0}
    found = {"memory": [MEMORY], "times": [warm, STEP]}
    file = written(tmp_path / "engines.json", {"spec": "a-run", "note": "Alone.", "planned_against_measured": found})
    lines = gpu_runs_table([read_gpu_run(file)]).splitlines()
    assert lines[2] == "| a-run | train +3.0% | 2 s | 1.5 s | -25.0% |"
    assert lines[-1] == "- a-run: Alone."


def test_a_run_beside_others_bounds_its_time_and_is_no_judge_of_the_plan(tmp_path: Path) -> None:
    found = {"memory": [], "times": [STEP]}
    content = {"spec": "a-run", "beside_others": True, "planned_against_measured": found}
    lines = gpu_runs_table([read_gpu_run(written(tmp_path / "engines.json", content))]).splitlines()
    assert lines[2] == "| a-run | not measured apart | 2 s | at most 1.5 s |  |"


def test_a_run_directorys_own_file_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    run = read_gpu_run(written(folder / "measured.json", {"memory": [], "times": [{**STEP, "runs": 1}]}))
    assert gpu_runs_table([run]).splitlines()[-1] == "| my-run | not measured apart |  |  |  |"


@pytest.mark.parametrize("content", [[], {}, {"planned_against_measured": {"memory": []}}])
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="no comparison"):
        read_gpu_run(written(tmp_path / "other.json", content))
