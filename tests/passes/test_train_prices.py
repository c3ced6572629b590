"""The columns give what the cost models give one by one, for any layout under any option."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.cost.train_memory import train_memory
from miles_plan.cost.train_time import log_prob_time, train_step_time
from miles_plan.passes.base import PassContext
from miles_plan.passes.train_choices import (
    TrainChoice,
    budget_candidates,
    fed,
    memory_options,
    search_train,
    time_options,
    train_workload,
)
from miles_plan.passes.train_prices import front_rows
from miles_plan.passes.workload import StepWorkload, step_workload
from tests.passes.contexts import context

JOBS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h200", "nodes": 2}},
    "latent attention, uneven stages": {"model": {"name": "deepseek-v3"}, "cluster": {"gpu": "b200", "nodes": 16}},
    "fp8, reference": {
        "precision": {"train": "fp8_blockwise", "rollout": "fp8_blockwise"},
        "algorithm": {"kind": "grpo", "kl_loss_coef": 0.01},
    },
    "fsdp2": {"train": {"engine": "fsdp2"}},
}


def one_by_one(ctx: PassContext, workload: StepWorkload, choice: TrainChoice) -> TrainChoice:
    """The same choice priced by the cost models' scalar entrances."""
    per_rank = workload.total_tokens / ctx.job.algorithm.updates_per_rollout / choice.layout.dp
    room = max(choice.tokens_per_gpu * choice.layout.cp, workload.longest_tokens)
    options = memory_options(ctx, workload, fed(ctx, workload, choice), microbatches=math.ceil(per_rank / room))
    held = train_memory(ctx.model, choice.layout, options)
    batch = train_workload(ctx, workload, choice.tokens_per_gpu)
    timed = time_options(ctx, choice)
    return replace(
        choice,
        step_s=train_step_time(ctx.model, choice.layout, batch, ctx.cluster, timed).mid,
        log_prob_s=log_prob_time(ctx.model, choice.layout, batch, ctx.cluster, timed).mid,
        peak_bytes=held.device_bytes.mid,
        static_bytes=held.static_bytes,
        host_bytes=held.host_bytes,
    )


@pytest.mark.parametrize("job", JOBS)
def test_columns_agree_with_the_scalar_models(job: str) -> None:
    ctx = context(**JOBS[job])
    workload = step_workload(ctx)
    found = search_train(ctx, ctx.cluster, ctx.cluster.num_gpus, workload)
    count = len(found.table.rows)
    assert count, "some of it fits"
    for row in np.random.default_rng(0).choice(count, size=min(count, 60), replace=False):
        choice = found.choice(int(row))
        expected = one_by_one(ctx, workload, choice)
        for name in ("step_s", "log_prob_s", "peak_bytes", "static_bytes", "host_bytes"):
            assert getattr(choice, name) == pytest.approx(getattr(expected, name), rel=1e-9), (name, choice)


def test_the_embedded_engine_is_asked_for_every_budget() -> None:
    ctx = context(
        model={"name": "qwen3-0.6b"},
        cluster={"gpu": "h200", "nodes": 1, "gpus_per_node": 2},
        train={"engine": "torch"},
        precision={"train": "fp32", "rollout": "fp32"},
    )
    workload = step_workload(ctx)
    found = search_train(ctx, ctx.cluster, 2, workload)
    assert len({choice.tokens_per_gpu for choice in found.choices}) > 1
    for choice in found.choices:
        assert choice.peak_bytes == pytest.approx(one_by_one(ctx, workload, choice).peak_bytes, rel=1e-9)


def test_every_budget_and_option_is_in_the_table_or_overflows() -> None:
    ctx = context()
    workload = step_workload(ctx)
    found = search_train(ctx, ctx.cluster, 4, workload)
    expected = sum(len(budget_candidates(workload, layout.cp)) * 3 * 2 for layout in found.table.layouts)
    assert len(found.table.rows) + found.table.overflowing == expected


def test_the_smallest_is_the_smallest() -> None:
    ctx = context(cluster={"gpu": "a100", "nodes": 1, "gpus_per_node": 2})
    found = search_train(ctx, ctx.cluster, 2, step_workload(ctx))
    assert found.smallest is not None
    assert all(found.smallest.peak_bytes <= choice.peak_bytes for choice in found.choices)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(-6, 6)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_front_rows_are_those_that_no_other_beats(rows: list[tuple[int, int, int]]) -> None:
    group, first, second = (np.array(column) for column in zip(*rows, strict=True))
    kept = front_rows(first.astype(float), second, within=group)
    for at, (of, one, two) in enumerate(rows):
        beaten = any(g == of and a <= one and b <= two and (a, b) != (one, two) for g, a, b in rows)
        same = [index for index in kept if rows[index] == rows[at]]
        assert len(same) == (0 if beaten else 1)
