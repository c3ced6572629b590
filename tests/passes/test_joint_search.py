"""The search's bounds and dominance leave out nothing: its best is that of brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from miles_plan.passes import joint_search, train_choices
from miles_plan.passes.base import PassContext
from miles_plan.passes.joint_search import Split, search_jointly, splits
from miles_plan.passes.layout_space import train_layouts
from miles_plan.passes.rollout_choices import search_rollout
from miles_plan.passes.train_choices import RECOMPUTE_ORDER, TrainChoice, budget_candidates, train_room, usable_bytes
from miles_plan.passes.workload import StepWorkload, step_workload
from tests.passes.contexts import context


def every_train_choice(ctx: PassContext, split: Split, workload: StepWorkload) -> list[TrainChoice]:
    """Every layout under every option, nothing left out but what does not fit."""
    layouts = train_layouts(ctx.model, train_room(ctx, split.train_gpus, workload))
    capacity = usable_bytes(ctx.cluster.groups[0])
    found: list[TrainChoice] = []
    for cp in {layout.cp for layout in layouts}:
        of_cp = [layout for layout in layouts if layout.cp == cp]
        for recompute, budget, offload in itertools.product(RECOMPUTE_ORDER, budget_candidates(workload, cp), (False, True)):
            options = train_choices._Options(recompute, budget, offload)
            found += train_choices._price(ctx, ctx.cluster, of_cp, workload, options, capacity)[0]
    return found


def brute_force_s(ctx: PassContext, workload: StepWorkload) -> float:
    """The fastest step of all: every split, every pair."""
    fastest_s = float("inf")
    for split in splits(ctx):
        trainers = every_train_choice(ctx, split, workload)
        if not trainers:
            continue
        sleeping = split.kind == "colocate"
        cheapest = min(
            trainers, key=lambda choice: (choice.step_s + choice.log_prob_s, choice.optimizer_offload, choice.peak_bytes)
        )
        residue = joint_search.sleeping_trainer_bytes(ctx, cheapest) if sleeping else 0.0
        engines = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=residue)
        price = joint_search._pricer(ctx, split, sleeping)
        for trainer, engine in itertools.product(trainers, engines.choices):
            whole = price(trainer, engine)
            if whole is not None:
                fastest_s = min(fastest_s, whole.step_s)
    return fastest_s


JOBS: dict[str, dict[str, Any]] = {
    "dense on one node": {},
    "split only": {"placement": "disaggregate"},
    "tight memory": {"cluster": {"gpu": "a100", "nodes": 1, "gpus_per_node": 4}},
    "reference model": {"algorithm": {"kind": "grpo", "kl_loss_coef": 0.01}},
    "overlapped": {"placement": "disaggregate", "schedule": {"mode": "one_step_off"}},
    "experts": {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 8}},
}


@pytest.mark.parametrize("job", JOBS)
def test_the_best_is_that_of_brute_force(job: str) -> None:
    ctx = context(**JOBS[job])
    workload = step_workload(ctx)
    found = search_jointly(ctx, workload)
    assert found.best, "the job fits"
    assert found.best[0].step_s == pytest.approx(brute_force_s(ctx, workload), rel=1e-9)


def test_the_bounds_do_leave_pairs_out() -> None:
    ctx = context()
    workload = step_workload(ctx)
    pairs = sum(
        len(every_train_choice(ctx, split, workload))
        * len(search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=0.0).choices)
        for split in splits(ctx)
    )
    assert search_jointly(ctx, workload).pairs_visited < pairs / 2
