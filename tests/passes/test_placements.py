"""Divisions of a cluster: whole nodes, one kind of GPU an engine, fewer GPUs where they are rented."""

from __future__ import annotations

from typing import Any

from miles_plan.ir.group import GpuSpan
from miles_plan.passes.compile import compile_job
from miles_plan.passes.placements import MAX_SPLITS, cluster_of_span, runs, splits
from miles_plan.spec import job_from_mapping
from tests.passes.contexts import context

TWO_KINDS = {"groups": [{"gpu": "h20", "nodes": 2}, {"gpu": "h200", "nodes": 2}]}


def shown(**job: Any) -> list[str]:
    """The placements of a job, as people say them."""
    return [str(split) for split in splits(context(**job))]


def test_one_node_is_divided_by_gpu_and_several_by_node() -> None:
    assert shown(cluster={"gpu": "h200", "nodes": 1, "gpus_per_node": 4}) == [
        "colocate on 4",
        "colocate on 2, 2 idle",
        "colocate on 1, 3 idle",
        "3 rollout + 1 train",
        "2 rollout + 2 train",
        "1 rollout + 3 train",
    ]
    assert shown(cluster={"gpu": "h200", "nodes": 3}) == ["colocate on 24", "16 rollout + 8 train", "8 rollout + 16 train"]


def test_what_the_spec_fixes_is_all_there_is() -> None:
    assert shown(placement="disaggregate", cluster={"gpu": "h200", "nodes": 2}) == ["8 rollout + 8 train"]
    assert shown(placement={"rollout_gpus": 3}) == ["3 rollout + 1 train"]


def test_large_clusters_are_divided_in_few_ways() -> None:
    assert len(shown(placement="disaggregate", cluster={"gpu": "h200", "nodes": 1280})) <= MAX_SPLITS


def test_kinds_of_gpu_are_not_mixed_in_one_engine() -> None:
    ctx = context(cluster=TWO_KINDS)
    assert [(run.gpu, run.first) for run in runs(ctx.cluster)] == [("h20", 0), ("h200", 16)]
    for split in splits(ctx):
        for side in (split.train, split.rollout):
            kinds = {group.gpu.name for group in cluster_of_span(ctx.cluster, side.span).groups}
            assert kinds == {side.run.gpu}
    assert "16 h20 rollout + 16 h200 train" in shown(cluster=TWO_KINDS)


def test_groups_of_like_nodes_are_one_run() -> None:
    ctx = context(cluster={"groups": [{"gpu": "h200", "nodes": 1}, {"gpu": "h200", "nodes": 2}]})
    assert [run.cluster.num_gpus for run in runs(ctx.cluster)] == [24]


def test_a_cluster_of_two_kinds_compiles_with_each_side_on_its_own() -> None:
    job = {
        "version": 1,
        "name": "two-kinds",
        "model": {"name": "qwen3-8b"},
        "cluster": TWO_KINDS,
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "placement": {"rollout_gpus": 16},
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 8, "response_tokens": {"max": 8192, "mean": 3500.0}},
    }
    plan = compile_job(job_from_mapping(job)).plan
    assert plan.graph.group("train").gpus == GpuSpan(first=16, count=16)
    assert plan.graph.group("rollout").gpus == GpuSpan(first=0, count=16)
    capacities = {str(each.gpus): each.capacity_bytes for each in plan.graph.memory if each.place == "gpu"}
    assert capacities["16..31"] > 1.3 * capacities["0..15"]
    other = compile_job(job_from_mapping(job | {"cluster": {"gpu": "h200", "nodes": 4}})).plan
    train = {task.name: task.estimate for task in plan.graph.tasks}["train"]
    assert train == {task.name: task.estimate for task in other.graph.tasks}["train"], "H200s train as fast in either cluster"
