"""run, resume, status, doctor: what they refuse, with what exit code. Whole runs are tested beside the executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles_plan.backends.executor.dataflow import Instance
from miles_plan.backends.executor.journal import Journal
from miles_plan.backends.executor.machine_checks import machine_checks
from miles_plan.backends.executor.progress import LineProgress, LiveProgress, figures_text, progress_for
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.status import read_status
from miles_plan.cli.run import is_plan
from miles_plan.ir.plan import write_plan
from tests.backends.executor.tiny_plans import tiny_plan

ROOT = Path(__file__).parents[2]


def miles_plan(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "miles_plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=60, check=False)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(tiny_plan(), path)
    return path


def test_a_plan_is_told_from_a_spec(plan_file: Path, tmp_path: Path) -> None:
    assert is_plan(plan_file)
    assert not is_plan(Path("specs/quickstart.yaml"))
    (tmp_path / "spec.json").write_text('{"version": 1}')
    assert not is_plan(tmp_path / "spec.json")


def test_a_reviewed_plan_takes_no_overrides(plan_file: Path) -> None:
    done = miles_plan("run", str(plan_file), "--seed", "3")
    assert done.returncode == 2
    assert "runs as it was reviewed" in done.stderr


def test_a_plan_that_was_changed_is_refused(plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"seed": 3', '"seed": 4'))
    done = miles_plan("run", str(plan_file))
    assert done.returncode == 1
    assert "was changed after it was written" in done.stderr


def test_a_bad_spec_is_refused_with_its_places(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("version: 1\ncolour: red\n")
    done = miles_plan("run", str(tmp_path / "bad.yaml"))
    assert done.returncode == 1
    assert "bad.yaml:2:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_executor_cannot_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = miles_plan("run", "specs/grpo_qwen3_30b_a3b.yaml", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "MP433" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_folder_that_holds_a_run_is_not_run_in_again(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_plan(tiny_plan(), tmp_path / "run" / "plan.json")
    done = miles_plan("run", str(plan_file), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 1
    assert f"miles-plan resume {tmp_path / 'run'}" in done.stderr


@pytest.mark.parametrize("command", ["resume", "status"])
def test_a_folder_without_a_run_is_refused(command: str, tmp_path: Path) -> None:
    done = miles_plan(command, str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "error[MP506]" in done.stderr
    assert "holds no run" in done.stderr


def test_doctor_says_what_is_there() -> None:
    done = miles_plan("doctor")
    assert done.returncode == 0
    assert "Ray tokens" in done.stdout


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {check.subject: check for check in machine_checks(tmp_path)}
    assert found["ray"].verdict == "problem"
    assert "miles-plan[run]" in found["ray"].help
    assert found["run folder"].verdict == "ok"


def test_a_killed_run_says_how_far_it_came_and_what_to_do(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.make()
    write_plan(tiny_plan(warm=2, iterations=4), directory.plan)
    journal = Journal(directory.journal)
    journal.begin_session(1)
    for iteration in range(2):
        for task in ("rows", "sft"):
            journal.complete(journal.start(Instance(task, iteration), "warm_start", 0), digest="d", weight_version=0)
    journal.start(Instance("sync", 0), "rl", 0)
    found = read_status(directory.root)
    assert found.phase == "killed"
    assert [(loop.name, loop.done, loop.iterations) for loop in found.loops] == [("warm_start", 2, 2), ("rl", 0, 4)]
    assert not found.tasks, "nobody works on them any more"
    done = miles_plan("status", str(directory.root))
    assert done.returncode == 0
    assert f"miles-plan resume {directory.root}" in done.stdout
    as_json = json.loads(miles_plan("status", str(directory.root), "--json").stdout)
    assert as_json["phase"] == "killed"


def test_progress_in_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_for(tiny_plan(iterations=2).graph.loops, sys.stderr)
    assert isinstance(progress, LineProgress)
    progress.start_step("initial weights", 0.4)
    progress.start_step("engines of @train, @rollout", 14.06)
    progress.loop_started("rl")
    progress.iteration_over({"loop": "rl", "iteration": 1, "reward_mean": 0.5, "step_s": 0.25, "task_s": {}})
    progress.close()
    assert capsys.readouterr().err == (
        "start: engines of @train, @rollout  14.1 s\nrl: 2 iterations\nrl 2/2  reward 0.5  0.25 s\n"
    )


def test_progress_on_a_terminal_draws_bars(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w+", encoding="utf-8") as stream:
        progress = LiveProgress(tiny_plan(iterations=2).graph.loops, stream)
        progress.restart_from({"warm_start": 2, "rl": 1})
        progress.loop_started("rl")
        progress.waiting("rollout@1", "@rollout: generate")
        progress.iteration_over({"loop": "rl", "iteration": 1, "loss": 1.0, "step_s": 0.25, "task_s": {}})
        progress.note("something happened")
        progress.close()
        stream.seek(0)
        text = stream.read()
    assert "2/2" in text
    assert "something happened" in text


def test_figures_leave_out_what_an_iteration_does_not_have() -> None:
    assert figures_text({"step_s": 1.0, "loss": 0.5}) == "loss 0.5  1.00 s"
