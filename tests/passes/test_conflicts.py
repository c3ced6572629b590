"""A job that does not fit gets a core that is minimal and changes that make it compile."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.diagnostics import PlanError
from miles_plan.passes.base import PassContext
from miles_plan.passes.compile import compile_job
from miles_plan.passes.conflicts import Changes, conflict_of, minimal_core, relaxations
from miles_plan.passes.feasibility import fits
from miles_plan.passes.joint_search import search_jointly
from miles_plan.passes.misfits import misfits
from miles_plan.passes.workload import step_workload
from miles_plan.spec import job_from_mapping
from tests.passes.contexts import context


def fit(ctx: PassContext) -> bool:
    """The search's question, of a job that generates."""
    return fits(ctx, generates=True)


def compiles(ctx: PassContext) -> bool:
    """Whether the whole pipeline makes a plan of the job as its spec would be written."""
    try:
        compile_job(job_from_mapping(ctx.job.model_dump(mode="json", exclude_unset=True)))
    except PlanError as refused:
        print(refused)
        return False
    return True


TIGHT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "layout fixed too small": (
        {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h200", "nodes": 2}, "train": {"layout": {"tp": 1}}},
        {"train.layout"},
    ),
    "cluster too small": ({"model": {"name": "deepseek-v3"}, "cluster": {"gpu": "h200", "nodes": 1}}, {"cluster.nodes"}),
    "context too long": (
        {
            "cluster": {"gpu": "h100", "nodes": 1},
            "rollout": {
                "prompts_per_step": 32,
                "samples_per_prompt": 4,
                "response_tokens": {"max": 1_048_576, "mean": 100_000.0, "p99": 900_000.0},
            },
        },
        {"rollout.response_tokens.max", "cluster.nodes"},
    ),
    "colocated without room": (
        {
            "model": {"name": "qwen3-30b-a3b"},
            "cluster": {"gpu": "h100", "nodes": 1},
            "placement": "colocate",
            "rollout": {
                "prompts_per_step": 32,
                "samples_per_prompt": 8,
                "response_tokens": {"max": 8192, "mean": 3500.0},
                "layout": {"tp": 1},
            },
            "train": {"layout": {"tp": 1, "ep": 4}},
        },
        {"rollout.layout", "train.layout", "placement", "precision.rollout"},
    ),
    "two settings at once": (
        {
            "model": {"name": "qwen3-30b-a3b"},
            "cluster": {"gpu": "h100", "nodes": 1},
            "placement": "colocate",
            "rollout": {
                "prompts_per_step": 32,
                "samples_per_prompt": 8,
                "response_tokens": {"max": 65_536, "mean": 20_000.0, "p99": 60_000.0},
            },
            "train": {"recompute": "none", "layout": {"tp": 2, "ep": 4}},
        },
        set(),
    ),
}


@pytest.mark.parametrize("name", TIGHT)
def test_core_and_changes(name: str) -> None:
    job, expected = TIGHT[name]
    ctx = context(**job)
    assert not compiles(ctx)
    conflict = conflict_of(ctx, fit)
    if expected:
        assert set(conflict.core) == expected
    assert conflict.changes
    for change in conflict.changes:
        assert compiles(change.apply(ctx)), str(change)


@given(
    st.sampled_from(["qwen3-8b", "qwen3-30b-a3b", "qwen3-235b-a22b"]),
    st.sampled_from(["h100", "h200"]),
    st.sampled_from(["auto", "colocate", "disaggregate"]),
    st.sampled_from([None, {"tp": 1}, {"tp": 2, "pp": 2}, {"tp": 8, "ep": 8}]),
    st.sampled_from(["auto", "none"]),
    st.sampled_from([4_096, 131_072]),
    st.sampled_from(["auto", 0.1, 0.6]),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_cores_are_minimal_and_changes_fit(
    model: str, gpu: str, placement: str, layout: dict[str, int] | None, recompute: str, tokens: int, fraction: Any
) -> None:
    ctx = context(
        model={"name": model},
        cluster={"gpu": gpu, "nodes": 1},
        placement=placement,
        train={"recompute": recompute} | ({"layout": layout} if layout else {}),
        rollout={
            "prompts_per_step": 64,
            "samples_per_prompt": 2,
            "response_tokens": {"max": tokens},
            "memory_fraction": fraction,
        },
    )
    workload = step_workload(ctx)
    impossible = any(True for _ in misfits(ctx, workload, generates=True))
    if not impossible:
        assert fits(ctx, generates=True) == bool(search_jointly(ctx, workload).front)
    if fits(ctx, generates=True):
        assert compiles(ctx), "no later pass refuses what the search has found to fit"
        return
    every = tuple(relaxations(ctx))
    core = minimal_core(ctx, every, fit)
    outside = tuple(each for each in every if each not in core)
    if core:
        assert not fits(Changes(outside).apply(ctx), generates=True), "the core conflicts by itself"
    for member in core:
        assert fits(Changes((*outside, member)).apply(ctx), generates=True), "without any one of it the rest fits"
    for change in conflict_of(ctx, fit).changes:
        changed = change.apply(ctx)
        assert search_jointly(changed, step_workload(changed)).front
