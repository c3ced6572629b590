"""Metrics: one line an iteration, none twice after a restart; the summary states its rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.backends.executor.metrics import MetricsFile, read_metrics
from miles_plan.backends.executor.summary import run_summary
from tests.backends.executor.tiny_plans import tiny_plan


def write_iterations(metrics: MetricsFile, iterations: range) -> None:
    for iteration in iterations:
        metrics.add("rl", iteration, "rollout", 0.5, {"tokens": 100, "reward_mean": float(iteration)})
        metrics.add("rl", iteration, "train", 0.25, {"loss": 1.0})
        metrics.close_iteration("rl", iteration)


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl", loop_offset={"warm_start": 0, "rl": 10}, tensorboard=tmp_path / "tb")


def test_a_line_holds_all_that_its_tasks_reported(metrics: MetricsFile) -> None:
    write_iterations(metrics, range(1))
    (line,) = read_metrics(metrics.path)
    assert line["step"] == 11
    assert line["task_s"] == {"rollout": 0.5, "train": 0.25}
    assert (line["loss"], line["reward_mean"]) == (1.0, 0.0)
    assert line["tokens_per_s"] > 0


def test_iterations_that_run_again_have_one_line(metrics: MetricsFile) -> None:
    write_iterations(metrics, range(5))
    metrics.add("rl", 5, "rollout", 0.5, {"tokens": 1})
    metrics.restart_from({"warm_start": 10, "rl": 3})
    write_iterations(metrics, range(3, 6))
    assert [line["iteration"] for line in read_metrics(metrics.path)] == [0, 1, 2, 3, 4, 5]
    assert read_metrics(metrics.path)[5]["tokens"] == 100


def test_a_line_that_a_checkpoint_held_is_written_when_the_crash_came_before_it(metrics: MetricsFile) -> None:
    write_iterations(metrics, range(2))
    metrics.add("rl", 2, "rollout", 0.5, {"tokens": 7})
    metrics.add("rl", 3, "prompts", 0.5, {})
    held = metrics.unwritten("rl", 2)
    assert [(line["iteration"], line["tokens"]) for line in held] == [(2, 7)]
    metrics.restart_from({"warm_start": 10, "rl": 3}, held)
    metrics.restart_from({"warm_start": 10, "rl": 3}, held)
    assert [line["iteration"] for line in read_metrics(metrics.path)] == [0, 1, 2]


def test_an_iteration_that_goes_on_after_its_checkpoint_has_one_whole_line(metrics: MetricsFile) -> None:
    metrics.add("rl", 0, "rollout", 0.5, {"tokens": 7})
    held = metrics.unwritten("rl", 0)
    metrics.restart_from({"warm_start": 10, "rl": 0}, held)
    metrics.add("rl", 0, "offload", 0.125, {})
    metrics.close_iteration("rl", 0)
    (line,) = read_metrics(metrics.path)
    assert line["task_s"] == {"rollout": 0.5, "offload": 0.125}
    assert line["tokens"] == 7


def test_a_line_torn_by_a_crash_is_left_out(metrics: MetricsFile) -> None:
    write_iterations(metrics, range(2))
    metrics.close()
    with metrics.path.open("a") as file:
        file.write('{"loop": "rl", "itera')
    assert len(read_metrics(metrics.path)) == 2


def test_tensorboard_gets_the_same_figures(metrics: MetricsFile, tmp_path: Path) -> None:
    write_iterations(metrics, range(2))
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("rl/reward_mean")] == [(11, 0.0), (12, 1.0)]
    assert [event.value for event in found.Scalars("rl/task_s/train")] == [0.25, 0.25]


def test_the_summary_follows_its_rule() -> None:
    lines = [{"loop": "warm_start", "iteration": 0, "loss": 1.0}]
    lines += [
        {
            "loop": "rl",
            "iteration": i,
            "reward_mean": i / 10,
            "max_abs_log_prob_diff": 0.0,
            "tokens_compared": 7,
            "routing_mismatches": 1,
        }
        for i in range(8)
    ]
    found = run_summary(
        tiny_plan(seed=9), lines, wall_s=1.23456, restarts=2, final_weights_sha256="ab", details={"sessions": 3}
    )
    details = found.pop("details")
    assert found == {
        "seed": 9,
        "steps": 8,
        "wall_s": 1.235,
        "reward_first": pytest.approx(0.1),
        "reward_last": pytest.approx(0.6),
        "max_abs_logprob_diff": 0.0,
        "tokens_compared": 56,
        "routing_mismatches": 8,
        "restarts": 2,
        "final_weights_sha256": "ab",
    }
    assert details["sessions"] == 3


def test_a_summary_without_rewards_or_comparison_says_so() -> None:
    found = run_summary(tiny_plan(), [], wall_s=0.0, restarts=0, final_weights_sha256=None, details={})
    assert found["reward_first"] is None
    assert found["max_abs_logprob_diff"] is None
