"""A run on Ray whose rollout engine is SGLang's, in its own process beside the actor; a stand-in takes the GPU's place.

Trainer, executor, weights in shared memory, SGLang's receiver and the engine's process are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_plan.backends.executor.events import read_lines

ROOT = Path(__file__).parents[3]
STAND_IN = ROOT / "tests" / "backends" / "sglang_engine" / "stand_in"

pytestmark = pytest.mark.slow


def start(root: Path, *how: str) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(STAND_IN), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.backends.executor.run_sglang", str(root), *how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def engine_pids(actor: int) -> list[int]:
    """Engine processes that an actor has started."""
    children = psutil.Process(actor).children()
    return [child.pid for child in children if any("engine_process" in part for part in child.cmdline())]


def until(root: Path, found: Callable[[list[Any]], bool], process: subprocess.Popen[str]) -> list[Any]:
    deadline = time.monotonic() + 120.0
    while True:
        events = list(read_lines(root / "events.jsonl")) if (root / "events.jsonl").exists() else []
        if found(events):
            return events
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, events[-3:]
        time.sleep(0.02)


def test_an_engine_whose_process_dies_is_made_anew_and_the_run_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(root)
    served = until(root, lambda events: any(each["kind"] == "weights_acknowledged" for each in events), process)
    actors = next(each for each in served if each["kind"] == "actors_started")["pids"]
    (engine,) = engine_pids(actors["@rollout rank 0"])
    os.kill(engine, signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    events = list(read_lines(root / "events.jsonl"))
    failed = [each for each in events if each["kind"] == "task_failed"]
    assert len(failed) == 1
    assert f"process {engine} ended by SIGKILL" in failed[0]["message"]
    assert failed[0]["action"] == "rebuild"
    assert not psutil.pid_exists(engine) or psutil.Process(engine).status() == psutil.STATUS_ZOMBIE
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["steps"], summary["restarts"]) == (4, 1)
    versions = [each["subject"] for each in events if each["kind"] == "weights_acknowledged"]
    assert versions[-1] == "version 3"
    text = (root / "logs" / "sglang-rollout-0.arguments").read_text()
    assert "tp_size = 1" in text


def test_log_probs_that_differ_stop_an_exact_run_and_the_trainer_is_asked_twice(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "exact")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "error[MP502]" in output
    assert "of the response of sample" in output
    assert "asked again, the trainer gives the same log-probs" in " ".join(output.split())
