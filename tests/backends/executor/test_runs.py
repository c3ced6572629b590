"""Whole runs on Ray with the real engines: killed, interrupted and spoilt, they end in the weights of a run left alone.

Every fault is proven to have struck (an exit status, an event) before its outcome counts, and every outcome is compared with a
twin of the same seed that nothing happened to, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.executor.events import read_lines
from miles_plan.backends.executor.janitor import processes_of
from miles_plan.backends.executor.journal import Journal
from miles_plan.backends.executor.status import read_status

ROOT = Path(__file__).parents[3]
COLOCATED: dict[str, Any] = {"iterations": 5, "checkpoint_every": 2, "evaluate_every": 2, "train": {"dp": 1}}
ASYNCHRONOUS: dict[str, Any] = {
    "max_restarts": 3,
    "iterations": 5,
    "distance": 3,
    "colocated": False,
    "moe": False,
    "checkpoint_every": 2,
}

pytestmark = pytest.mark.slow

Event = Mapping[str, Any]


class TinyRun:
    """One folder and the sessions that work on it, one after the other."""

    def __init__(self, root: Path, options: Mapping[str, Any]) -> None:
        self.root, self.options = root, json.dumps(options)
        self.process: subprocess.Popen[str] | None = None
        self.seen = 0

    def start(self) -> None:
        self.seen = len(list(read_lines(self.root / "events.jsonl")))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.backends.executor.run_tiny", str(self.root), self.options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def events(self, **wanted: Any) -> list[Event]:
        """Events of the session under way (or the last one) whose fields are as wanted."""
        found = list(read_lines(self.root / "events.jsonl"))[self.seen :]
        return [event for event in found if all(event.get(name) == value for name, value in wanted.items())]

    def until(self, **wanted: Any) -> Event:
        """Wait for an event of this session."""
        assert self.process is not None
        deadline = time.monotonic() + 120
        while not (found := self.events(**wanted)):
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {wanted}: {self.output()}"
            assert time.monotonic() < deadline, f"no {wanted}; last events {self.events()[-3:]}"
            time.sleep(0.01)
        return found[0]

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Wait for the session's end; its exit status."""
        assert self.process is not None
        return self.process.wait(180)

    def output(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def finish(self) -> dict[str, Any]:
        """Run to the end; the summary."""
        self.start()
        status = self.end()
        assert status == 0, self.output()
        summary: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return summary

    def leaves_nothing(self, within_s: float) -> bool:
        """Whether every process of the last session, and its temporary folder, are gone in time."""
        belongings = json.loads((self.root / "lock").read_text() or "{}").get("belongings")
        if belongings is None:
            return True  # a clean end: the lock file was emptied after everything was gone
        deadline = time.monotonic() + within_s
        while list(processes_of(belongings["marker"])) or Path(belongings["temporary"]).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The summary of the twin that nothing happens to; each is run once."""
    found: dict[str, dict[str, Any]] = {}

    def run(options: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(options, sort_keys=True)
        if key not in found:
            root = tmp_path_factory.mktemp("clean") / "run"
            found[key] = {**TinyRun(root, options).finish(), "root": root}
        return found[key]

    return run


Clean = Callable[[Mapping[str, Any]], dict[str, Any]]


def test_a_run_left_alone_writes_all_it_promises(clean: Clean) -> None:
    summary = clean(COLOCATED)
    root: Path = summary["root"]
    assert summary["steps"] == 5
    assert summary["max_abs_logprob_diff"] == 0.0
    assert summary["tokens_compared"] > 100
    assert summary["routing_mismatches"] == 0
    assert summary["restarts"] == 0
    for name in ("plan.json", "metrics.jsonl", "timeline.jsonl", "report.html", "trace.json", "final/model.safetensors"):
        assert (root / name).exists(), name
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    metrics = list(read_lines(root / "metrics.jsonl"))
    assert [(line["loop"], line["iteration"]) for line in metrics] == [
        ("warm_start", 0),
        ("warm_start", 1),
        *(("rl", iteration) for iteration in range(5)),
    ]
    assert "evaluation_reward_mean" in metrics[-1]
    assert len({line["weight_version"] for line in metrics if line["loop"] == "rl"}) == 5
    status = read_status(root)
    assert status.phase == "finished"
    assert [(loop.name, loop.done) for loop in status.loops] == [("warm_start", 2), ("rl", 5)]
    assert not status.tasks


def test_a_run_killed_interrupted_and_spoilt_ends_in_the_same_weights(tmp_path: Path, clean: Clean) -> None:
    """Killed while its first checkpoint is written, stopped by Ctrl-C in a training step, its newest checkpoint spoilt."""
    run = TinyRun(tmp_path / "run", COLOCATED)
    run.start()
    run.until(kind="waiting", owner="checkpoint@1")
    run.signal(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert run.leaves_nothing(within_s=20)

    run.start()
    run.until(kind="waiting", owner="train@3")
    loaded = [event["subject"] for event in run.events(kind="checkpoint_loaded")]
    assert loaded in ([], ["step-000004"]), "it began again, unless the kill came a moment too late"
    run.signal(signal.SIGINT)
    assert run.end() == 130
    assert run.events(kind="checkpoint_written", subject="step-000006")
    assert run.leaves_nothing(within_s=0)

    newest = run.root / "checkpoints" / "step-000006" / "rank_00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run.start()
    run.until(kind="waiting", owner="rollout@4")
    assert [event["subject"] for event in run.events(kind="checkpoint_refused")] == [str(newest)]
    assert [event["subject"] for event in run.events(kind="checkpoint_loaded")] == ["step-000004"]
    run.signal(signal.SIGTERM)
    time.sleep(0.05)
    began = time.monotonic()
    run.signal(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - began < 2.0, "the second signal waits for nothing"
    assert run.leaves_nothing(within_s=10)

    summary, twin = run.finish(), clean(COLOCATED)
    assert summary["final_weights_sha256"] == twin["final_weights_sha256"]
    assert summary["tokens_compared"] == twin["tokens_compared"]
    assert summary["reward_last"] == twin["reward_last"]
    assert summary["restarts"] == 3
    assert summary["details"]["digests_differ"] == 0
    journal = Journal(run.root / "journal.sqlite", read_only=True)
    trained = [row.iteration for row in journal.rows(status="completed") if row.task == "train"]
    assert sorted(trained) == [0, 1, 2, 3, 4], "every optimizer step is in the weights once"


def test_asynchronous_runs_survive_the_loss_of_an_engine_and_of_the_driver(tmp_path: Path, clean: Clean) -> None:
    """Rollouts run ahead with older weights: these come back from the checkpoint too."""
    run = TinyRun(tmp_path / "run", ASYNCHRONOUS)
    run.start()
    pids = run.until(kind="actors_started")["pids"]
    run.until(kind="waiting", owner="rollout@1")
    os.kill(pids["@rollout rank 0"], signal.SIGKILL)
    assert run.until(kind="task_failed")["action"] == "rebuild"
    run.until(kind="actors_rebuilt", subject="rollout")
    os.kill(run.until(kind="waiting", owner="reward@1") and pids["host"], signal.SIGKILL)
    run.until(kind="actors_rebuilt", subject="host")
    run.until(kind="checkpoint_written")
    run.signal(signal.SIGKILL)
    run.end()
    (manifest,) = [json.loads(path.read_text()) for path in (run.root / "checkpoints").glob("*/manifest.json")]
    assert len(manifest["manifest"]["older_weights"]) == 2, "two versions before the newest are still asked for"
    summary = run.finish()
    twin = clean(ASYNCHRONOUS)
    assert summary["final_weights_sha256"] == twin["final_weights_sha256"]
    assert summary["details"]["digests_differ"] == 0


def test_a_stuck_process_and_a_dead_one_are_named_and_rolled_back(tmp_path: Path, clean: Clean) -> None:
    run = TinyRun(tmp_path / "run", {**COLOCATED, "deadline_s": 10.0})
    run.start()
    assert run.process is not None
    pids = run.until(kind="actors_started")["pids"]
    run.until(kind="waiting", owner="rollout@1")
    os.kill(pids["@rollout rank 0"], signal.SIGSTOP)
    status = read_status(run.root)
    assert status.phase == "running"
    assert status.owner["pid"] == run.process.pid
    assert [task.instance for task in status.tasks][-1] == "rollout@1"
    assert status.tasks[-1].waits_for.startswith("@rollout: generate with weights version ")
    overdue = run.until(kind="overdue")
    assert overdue["subject"].startswith(("@rollout: ", "@train: "))
    assert overdue["age_s"] >= 9.0
    run.until(kind="rolled_back", subject="the start")

    pids = run.events(kind="actors_started")[-1]["pids"]
    run.until(kind="waiting", owner="train@3")
    os.kill(pids["@train rank 0"], signal.SIGKILL)
    run.until(kind="rolled_back", subject="rl 1")
    assert run.end() == 0, run.output()
    assert [event["cause"] for event in run.events(kind="task_failed")] == ["overdue", "died"]
    summary = json.loads((run.root / "summary.json").read_text())
    assert summary["final_weights_sha256"] == clean(COLOCATED)["final_weights_sha256"]
    assert summary["restarts"] == 2


def test_two_engines_and_one_over_two_ranks_lead_to_the_same_weights(clean: Clean) -> None:
    """With data-parallel training, two updates a step, dynamic sampling, and a reward that fails on some samples."""
    options = {
        "iterations": 3,
        "keep_prompts": 3,
        "updates": 2,
        "train": {"dp": 2},
        "reward": "tests.backends.executor.tiny_rewards:raises_on_short",
        "reward_failure": "drop",
    }
    engines = clean({**options, "rollout": {"engines": 2}})
    ranks = clean({**options, "rollout": {"tp": 2}})
    assert engines["final_weights_sha256"] == ranks["final_weights_sha256"]
    assert engines["max_abs_logprob_diff"] == ranks["max_abs_logprob_diff"] == 0.0
    lines = [line for line in read_lines(engines["root"] / "metrics.jsonl") if line["loop"] == "rl"]
    assert all(line["filter_prompts_kept"] == 3 for line in lines)
    assert sum(line["reward_failures"] for line in lines) > 0, "the reward was meant to fail on some"
    warnings = [event for event in read_lines(engines["root"] / "events.jsonl") if event["kind"] == "warning"]
    assert "too short for me" in warnings[0]["first"][0]


def test_a_run_that_cannot_go_on_says_why_and_a_second_one_is_refused(tmp_path: Path) -> None:
    options = {"iterations": 2, "warm": 0, "reference": False, "reward": "tests.backends.executor.tiny_rewards:raises_on_short"}
    run = TinyRun(tmp_path / "run", {**options, "reward_failure": "fail"})
    run.start()
    run.until(kind="waiting")
    second = TinyRun(run.root, {**options, "reward_failure": "fail"})
    second.start()
    assert second.end() == 1
    assert f"in use by process {run.process.pid if run.process else None}" in second.output()
    assert run.end() == 4
    output = run.output()
    assert "error[MP510]" in output
    assert "too short for me" in output
    assert f"miles-plan resume {run.root}" in output
    assert not (run.root / "summary.json").exists()
