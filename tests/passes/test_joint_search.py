"""Bounds and dominance leave out nothing: the front is that of brute force, pair by pair, with every transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.cost.weight_sync import offload_time
from miles_plan.ir.tasks import Transport
from miles_plan.passes import joint_search
from miles_plan.passes.base import PassContext
from miles_plan.passes.joint_search import search_jointly
from miles_plan.passes.pair_prices import open_transports, sync_s, train_part_s
from miles_plan.passes.placements import Split, splits
from miles_plan.passes.rollout_choices import RolloutChoice, search_rollout, size_engines
from miles_plan.passes.staleness import staleness_of
from miles_plan.passes.sync_price import price_class
from miles_plan.passes.train_choices import PASSES_OF_UPDATE, TrainChoice, search_train, usable_bytes
from miles_plan.passes.workload import StepWorkload, step_workload
from tests.passes.contexts import context

Point = tuple[float, float, int]  # step time, GPU-hours, level of headroom


def price(
    ctx: PassContext, split: Split, train: TrainChoice, engine: RolloutChoice, transport: Transport
) -> tuple[float, float] | None:
    """Step seconds and headroom of one pair with one transport, by the definition; None where it does not fit."""
    cluster = split.train.cluster
    headroom = min(usable_bytes(group) for group in cluster.groups) - train.peak_bytes
    moved_s = 0.0
    if split.kind == "colocate":
        headroom -= engine.memory.asleep_bytes
        moved_s += offload_time(train.static_bytes, cluster).mid + offload_time(train.static_bytes, cluster, "in").mid
        moved_s += offload_time(0.0, cluster).mid  # the trainer leaves in two goes, states before the sync and weights after
        moved_s += 3.0 * offload_time(0.0, cluster, "in").mid  # weights, cache, both out: mapped and unmapped, not copied
    if headroom < 0:
        return None
    rollout_s = engine.rollout_s + sync_s(ctx, split, train.layout, engine.layout, transport)
    train_s = train_part_s(ctx, train)
    if staleness_of(ctx)[1] and split.kind == "disaggregate":
        return max(train_s, rollout_s), headroom
    return train_s + rollout_s + moved_s, headroom


def every_point(ctx: PassContext, workload: StepWorkload) -> Iterator[Point]:
    """Every pair of every split by every transport, nothing left out but what does not fit."""
    level_bytes = joint_search.HEADROOM_STEP * min(group.gpu.usable_bytes for group in ctx.cluster.groups)
    for split in splits(ctx):
        trainers = list(search_train(ctx, split.train.cluster, split.train_gpus, workload).choices)
        if not trainers:
            continue
        residue = max(each.asleep_bytes for each in trainers)
        beside = residue if split.kind == "colocate" else 0.0
        engines = search_rollout(ctx, split.rollout.cluster, split.rollout_gpus, workload, resident_bytes=beside).choices
        for train in trainers:
            for engine in engines:
                for transport in open_transports(ctx, split):
                    if found := price(ctx, split, train, engine, transport):
                        yield found[0], found[0] * split.num_gpus / 3600.0, int(found[1] // level_bytes)


def front_of(points: Iterator[Point]) -> list[Point]:
    """The points that no other is at least as good as in everything."""
    kept: list[Point] = []
    for point in sorted(set(points), key=lambda each: (each[0], each[1], -each[2])):
        if not any(other[1] <= point[1] and other[2] >= point[2] for other in kept):
            kept.append(point)
    return kept


def check(ctx: PassContext) -> None:
    """The search's front is brute force's."""
    workload = step_workload(ctx)
    expected = front_of(every_point(ctx, workload))
    found = [(each.step_s, each.gpu_hours, each.headroom_level) for each in search_jointly(ctx, workload).front]
    assert [point[2] for point in found] == [point[2] for point in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


JOBS: dict[str, dict[str, Any]] = {
    "dense on one node": {},
    "split only": {"placement": "disaggregate", "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 3}},
    "tight memory": {"cluster": {"gpu": "a100", "nodes": 1, "gpus_per_node": 4}},
    "overlapped": {"placement": "disaggregate", "schedule": {"mode": "one_step_off"}},
    "two kinds of GPU": {
        "cluster": {"groups": [{"gpu": "h20", "nodes": 1, "gpus_per_node": 2}, {"gpu": "h200", "nodes": 1, "gpus_per_node": 2}]}
    },
    "quantised engines": {"precision": {"rollout": "fp8_blockwise"}, "placement": "disaggregate"},
}


@pytest.mark.parametrize("job", JOBS)
def test_the_front_is_that_of_brute_force(job: str) -> None:
    check(context(**JOBS[job]))


@given(
    st.sampled_from(["qwen3-0.6b", "qwen3-4b", "qwen3-8b"]),
    st.sampled_from(["a100", "h20", "h200", "b200"]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(["auto", "colocate", "disaggregate"]),
    st.sampled_from([512, 3000]),
    st.sampled_from([0.0, 0.02]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_front_is_that_of_brute_force_for_any_small_job(
    model: str, gpu: str, gpus: int, placement: str, tokens: int, kl: float
) -> None:
    check(
        context(
            model={"name": model},
            cluster={"gpu": gpu, "nodes": 1, "gpus_per_node": gpus},
            placement=placement,
            algorithm={"kind": "grpo", "kl_loss_coef": kl},
            rollout={"prompts_per_step": 8, "samples_per_prompt": 4, "response_tokens": {"max": tokens}},
            train={"recompute": "full" if gpus == 4 else "auto"},
        )
    )


def test_experts_on_eight_gpus() -> None:
    check(
        context(
            model={"name": "qwen3-30b-a3b"},
            cluster={"gpu": "h200", "nodes": 1, "gpus_per_node": 8},
            placement={"rollout_gpus": 4},
            train={"tokens_per_gpu": 8192},
        )
    )


def test_the_bounds_do_leave_work_out() -> None:
    ctx = context(cluster={"gpu": "h200", "nodes": 1, "gpus_per_node": 8})
    workload = step_workload(ctx)
    rows = sum(len(search_train(ctx, split.train.cluster, split.train_gpus, workload).table.rows) for split in splits(ctx))
    found = search_jointly(ctx, workload)
    assert found.rows_timed < 0.8 * rows
    assert found.pairs_priced < found.rows_timed


@given(st.sampled_from(["qwen3-8b", "qwen3-30b-a3b", "deepseek-v3"]), st.integers(4, 600), st.integers(200, 16000))
@settings(max_examples=25, deadline=None)
def test_no_simulation_beats_its_bound(model: str, prompts: int, tokens: int) -> None:
    ctx = context(
        model={"name": model},
        cluster={"gpu": "h200", "nodes": 2},
        rollout={"prompts_per_step": prompts, "samples_per_prompt": 4, "response_tokens": {"max": tokens}},
    )
    workload = step_workload(ctx)
    for choice in search_rollout(ctx, ctx.cluster, 16, workload, resident_bytes=0.0).choices:
        sized = size_engines(ctx, ctx.cluster, choice.layout, workload, resident_bytes=0.0)
        assert not isinstance(sized, str)
        assert sized.floor_s() <= choice.rollout_s


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "qwen3-8b", "deepseek-v3"])
def test_an_update_takes_two_passes_at_least(model: str) -> None:
    ctx = context(model={"name": model}, cluster={"gpu": "h200", "nodes": 64 if model == "deepseek-v3" else 2})
    workload = step_workload(ctx)
    rows = search_train(ctx, ctx.cluster, ctx.cluster.num_gpus, workload).table.rows
    assert len(rows)
    assert (rows.step_s >= PASSES_OF_UPDATE * rows.log_prob_s).all()
    assert (rows.step_s + rows.log_prob_s).min() >= joint_search.train_floor_s(ctx, ctx.cluster, ctx.cluster.num_gpus, workload)


@pytest.mark.parametrize("precision", ["bf16", "fp8_blockwise"])
def test_layouts_of_one_class_sync_in_equal_time(precision: str) -> None:
    ctx = context(
        model={"name": "qwen3-30b-a3b"},
        cluster={"gpu": "h200", "nodes": 2},
        placement="disaggregate",
        precision={"rollout": precision},
    )
    workload = step_workload(ctx)
    split = next(splits(ctx))
    layouts = {each.layout for each in search_train(ctx, ctx.cluster, split.train_gpus, workload).choices}
    engine = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=0.0).choices[0]
    for transport in open_transports(ctx, split):
        seconds: dict[tuple[int, ...], float] = {}
        for layout in layouts:
            price_s = sync_s(ctx, split, layout, engine.layout, transport)
            assert seconds.setdefault(price_class(ctx, transport, layout), price_s) == price_s


def test_trainer_and_engines_take_different_kinds_of_gpu() -> None:
    cluster = {"groups": [{"gpu": "h20", "nodes": 2}, {"gpu": "h200", "nodes": 1}]}
    ctx = context(cluster=cluster, placement="disaggregate", model={"name": "qwen3-4b"})
    found = search_jointly(ctx, step_workload(ctx))
    apart = [each for each in found.of_splits if each.split.train.run != each.split.rollout.run]
    assert {(each.split.train.run.gpu, each.split.rollout.run.gpu) for each in apart} == {("h20", "h200"), ("h200", "h20")}
    on_h200 = next(each for each in apart if each.split.train.run.gpu == "h200")
    assert (on_h200.split.train.span.first, on_h200.split.train_gpus) == (16, 8)
    assert (on_h200.split.rollout.span.first, on_h200.split.rollout_gpus) == (0, 16)
    alone = context(cluster={"gpu": "h200", "nodes": 1}, placement="colocate", model={"name": "qwen3-4b"})
    same = search_train(alone, alone.cluster, 8, step_workload(alone))
    prices = {(each.layout, each.recompute, each.tokens_per_gpu, each.optimizer_offload): each.step_s for each in same.choices}
    train = on_h200.train
    assert prices[train.layout, train.recompute, train.tokens_per_gpu, train.optimizer_offload] == train.step_s
