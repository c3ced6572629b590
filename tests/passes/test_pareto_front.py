"""What a plan shows of the front: the ends are always kept, the choice comes first, and each point says why it is there."""

from __future__ import annotations

from typing import Any

import pytest

from miles_plan.passes.binding_constraint import binding_constraint
from miles_plan.passes.joint_search import search_jointly
from miles_plan.passes.pareto_front import candidates, kept_points
from miles_plan.passes.workload import step_workload
from tests.passes.contexts import context

JOBS: dict[str, dict[str, Any]] = {
    "eight GPUs": {"cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 8}},
    "experts": {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h200", "nodes": 2}},
}


@pytest.mark.parametrize("job", JOBS)
def test_what_is_kept(job: str) -> None:
    ctx = context(**JOBS[job])
    search = search_jointly(ctx, step_workload(ctx))
    for limit in (3, 12):
        kept = kept_points(search.front, limit)
        assert len(kept) == min(limit, len(search.front))
        assert kept[0] is search.front[0]
        assert min(each.gpu_hours for each in kept) == min(each.gpu_hours for each in search.front)
        assert max(each.headroom_level for each in kept) == max(each.headroom_level for each in search.front)
    shown = list(candidates(search, "time"))
    assert [each.chosen for each in shown] == [True] + [False] * (len(shown) - 1)
    assert [each.binding for each in shown] == ["time"] + [""] * (len(shown) - 1)
    assert shown[0].why.startswith("fastest")
    assert any("cheapest" in each.why for each in shown)
    assert any("most headroom" in each.why for each in shown)
    assert all(each.why for each in shown)
    for one in shown:
        assert not any(
            other.step_s < one.step_s
            and other.gpu_hours_per_step < one.gpu_hours_per_step
            and other.headroom_bytes > one.headroom_bytes
            for other in shown
        )


def test_fewer_gpus_are_on_the_front_where_they_are_cheaper() -> None:
    ctx = context(model={"name": "qwen3-30b-a3b"}, cluster={"gpu": "h200", "nodes": 2})
    shown = list(candidates(search_jointly(ctx, step_workload(ctx)), ""))
    cheapest = min(shown, key=lambda each: each.gpu_hours_per_step)
    assert "idle" in cheapest.placement


@pytest.mark.parametrize(
    ("job", "binding"),
    [
        ({"cluster": {"gpu": "h20", "nodes": 1, "gpus_per_node": 2}, "placement": "colocate"}, "memory of the training GPUs"),
        (
            {
                "placement": {"rollout_gpus": 1},
                "rollout": {"prompts_per_step": 512, "samples_per_prompt": 8, "response_tokens": {"max": 16000}},
            },
            "memory of the rollout GPUs",
        ),
        (
            {"rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "response_tokens": {"max": 30000, "mean": 900.0}}},
            "its longest response alone",
        ),
    ],
)
def test_the_binding_constraint_is_named(job: dict[str, Any], binding: str) -> None:
    ctx = context(**job)
    workload = step_workload(ctx)
    search = search_jointly(ctx, workload)
    assert search.sized is not None
    assert binding in binding_constraint(ctx, workload, search.front[0], search.sized)
