from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_plan.ir.plan import Plan, PlanFileError, write_plan
from miles_plan.report.metrics import log_prob_verdict, loops_of, metrics_of, series
from miles_plan.report.run_facts import is_quiet, reward_ends, run_facts
from miles_plan.report.run_files import read_run


def test_a_whole_run(run_dir: Path) -> None:
    record = read_run(run_dir)
    assert record.problems == ()
    assert loops_of(record) == ["warm_start", "rl"]
    assert len(record.metrics) == 100
    assert {file.name for file in record.files} >= {"plan.json", "metrics.jsonl", "checkpoints"}
    facts = dict(run_facts(record))
    assert facts["log-probs"] == "rollout against trainer: exactly 0 in all 60 iterations, 67,267 tokens compared"
    assert facts["routing"] == "no mismatch"


def test_a_run_that_has_only_begun(tmp_path: Path, embedded_plan: Plan) -> None:
    write_plan(embedded_plan, tmp_path / "plan.json")
    record = read_run(tmp_path)
    assert (record.metrics, record.runs, record.events, dict(record.summary)) == ((), (), (), {})
    assert dict(run_facts(record))["state"].startswith("not finished")
    assert reward_ends(record, "rl") is None


def test_no_plan_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"plan\.json: no such file"):
        read_run(tmp_path)


def test_a_torn_last_line_is_left_out_in_silence_and_a_bad_one_is_named(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines) + '{"loop": "rl", "itera', encoding="utf-8")
    assert read_run(run_dir).problems == ()
    path.write_text("".join([lines[0], '{"loop": 3}\n', "not json\n", *lines[1:]]), encoding="utf-8")
    record = read_run(run_dir)
    assert record.problems == ("metrics.jsonl: 2 of 102 lines could not be used, the first is line 2",)
    assert len(record.metrics) == 100


def test_after_a_resume_the_later_line_of_an_iteration_counts(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"loop": "rl", "iteration": 59, "reward_mean": 0.123}) + "\n")
    record = read_run(run_dir)
    assert len(record.metrics) == 100
    reward = next(metric for metric in metrics_of(record, "rl") if metric.key == "reward_mean")
    assert series(record, "rl", reward).values[-1] == 0.123


def test_values_that_are_no_number_are_set_apart(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loop": "rl", "iteration": 60, "loss": NaN, "grad_norm": Infinity, "extra_figure": 2, "note": "text"}\n')
    record = read_run(run_dir)
    metrics = {metric.key: series(record, "rl", metric) for metric in metrics_of(record, "rl")}
    assert metrics["loss"].odd == metrics["grad_norm"].odd == (60,)
    assert metrics["extra_figure"].values == (2.0,)
    assert "note" not in metrics


def test_one_difference_is_not_called_zero(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loop": "rl", "iteration": 60, "max_abs_log_prob_diff": 1e-12, "tokens_compared": 3}\n')
    assert log_prob_verdict(read_run(run_dir)) == "up to 1e-12 nats, not 0 in 1 of 61 iterations, 67,270 tokens compared"
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loop": "rl", "iteration": 61, "max_abs_log_prob_diff": NaN}\n')
    assert "not 0 in 2 of 62 iterations" in (log_prob_verdict(read_run(run_dir)) or "")


def test_what_is_out_of_the_ordinary(run_dir: Path) -> None:
    loud = [event["kind"] for event in read_run(run_dir).events if not is_quiet(event)]
    assert loud == ["task_failed", "actors_rebuilt"]
