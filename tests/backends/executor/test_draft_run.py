"""Whole runs with a speculative draft, and what of it the executor refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.executor.metrics import read_metrics
from miles_plan.backends.executor.operations.rollout import DRAFT_COUNTS, draft_figures
from miles_plan.backends.executor.unsupported import unsupported
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import AnyTask, DraftStep, Rollout
from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job

SPECS = Path(__file__).parents[3] / "specs"
TINY = ("warm_start.steps=6", "algorithm.steps=4", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4")


def compiled(spec: str, *sets: str) -> Plan:
    return compile_job(load_job(SPECS / spec, [*TINY, *sets])).plan


def run(folder: Path, spec: str, *sets: str) -> tuple[dict[str, Any], list[Any]]:
    """The summary of a run in a process of its own, and the metrics of its second loop."""
    overrides = [word for each in (*TINY, *sets) for word in ("--set", each)]
    command = [sys.executable, "-m", "miles_plan", "run", str(SPECS / spec), "--run-dir", str(folder), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["loop"] == "rl"]
    return json.loads((folder / "summary.json").read_text()), lines


@pytest.mark.slow
def test_a_run_with_a_draft_ends_with_the_weights_of_a_run_without(tmp_path: Path) -> None:
    plain, expected = run(tmp_path / "plain", "quickstart.yaml")
    drafted, found = run(tmp_path / "drafted", "quickstart_speculative.yaml")
    assert drafted["final_weights_sha256"] == plain["final_weights_sha256"]
    for name in ("rollout_log_prob_mean", "loss", "entropy", "grad_norm", "reward_mean"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    assert all(1.0 <= line["accept_length"] <= 3.0 for line in found)
    assert all(0.0 <= line["accept_rate"] <= 1.0 for line in found)
    assert all(line["draft_grad_norm"] > 0 and not line["draft_skipped_steps"] for line in found)
    assert all(0.0 <= line["draft_accuracy"] <= 1.0 for line in found)
    assert "accept_length" not in expected[0]
    assert "draft_loss" not in expected[0]


@pytest.mark.slow
def test_a_draft_does_not_change_an_overlapped_run_either(tmp_path: Path) -> None:
    speculative = "rollout.speculative={method: eagle, steps: 2, train: true}"
    plain, _ = run(tmp_path / "plain", "quickstart_one_step_off.yaml")
    drafted, found = run(tmp_path / "drafted", "quickstart_one_step_off.yaml", speculative)
    assert drafted["final_weights_sha256"] == plain["final_weights_sha256"]
    assert all(np.isfinite(line["draft_loss"]) for line in found)


def problems(plan: Plan) -> str:
    return "\n".join(finding.message for finding in unsupported(plan))


def changed(plan: Plan, kind: type[AnyTask], **fields: Any) -> Plan:
    tasks = [replace(task, **fields) for task in plan.graph.tasks if isinstance(task, kind)]
    return replace(plan, graph=plan.graph.with_replaced(*tasks))


def test_what_the_engines_cannot_draft_is_refused_before_the_run() -> None:
    plan = compiled("quickstart_speculative.yaml")
    assert problems(plan) == ""
    speculation = next(task.speculation for task in plan.graph.tasks if isinstance(task, Rollout))
    assert speculation is not None
    assert "method: mtp" in problems(changed(plan, Rollout, speculation=replace(speculation, method="mtp")))
    assert "a tree of drafts" in problems(changed(plan, Rollout, speculation=replace(speculation, topk=2)))
    plain = compiled("quickstart.yaml")
    assert "nobody trains" in problems(changed(plain, Rollout, speculation=speculation))
    staged = replace(plan, graph=replace(plan.graph, groups=tuple(map(with_two_stages, plan.graph.groups))))
    assert "pipeline stages" in problems(staged)
    assert any(isinstance(task, DraftStep) for task in plan.graph.tasks)


def with_two_stages(group: DeviceGroup) -> DeviceGroup:
    if group.train_layout is None:
        return group
    return replace(group, train_layout=replace(group.train_layout, pp=2))


def test_accept_length_is_tokens_by_verification_over_all_engines() -> None:
    reports = [dict(zip(DRAFT_COUNTS, counts, strict=True)) for counts in ((3, 6, 5, 4), (1, 3, 3, 2))]
    assert draft_figures(reports) == {"accept_length": 2.25, "accept_rate": 0.75}
    assert draft_figures([dict.fromkeys(DRAFT_COUNTS, 0)]) == {}
