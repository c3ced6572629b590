"""Evaluation: every held-out prompt, sampled with the weights that are served, scored, and never learned from."""

from __future__ import annotations

from typing import Any

from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait
from miles_plan.backends.executor.operations.reward import scored
from miles_plan.backends.executor.operations.rollout import sampled, with_stops
from miles_plan.ir.tasks import Evaluate

FIRST_ID = 1 << 48  # far from the ids of what is trained on: random numbers are keyed by sample id


def held_out(host: HostTasks, task: Evaluate) -> tuple[dict[str, int], DrawnPrompts]:
    """All prompts of the task's source, in file order."""
    prompts = tuple(host.evaluation_prompts(task).in_file_order())
    return {"prompts": len(prompts)}, DrawnPrompts(prompts, task.samples_per_prompt, FIRST_ID)


def evaluate(context: Context) -> Operation:
    """Mean reward over the held-out prompts."""
    task, version = context.task, context.value("weights")
    assert isinstance(task, Evaluate)
    calls = context.host.produce(held_out, task)
    (report,) = yield Wait(f"host: read '{task.source}'", calls)
    drawn: Any = calls.values[0]
    sampling = with_stops(task.sampling, context.services.end_token)
    samples, _ = yield from sampled(context, drawn, sampling, version, group=task.group or "", routed=False)
    _, result = yield from scored(context, task, drawn, samples)
    figures = {
        "evaluation_reward_mean": result["figures"]["reward_mean"],
        "evaluation_prompts": report["prompts"],
        "evaluation_weight_version": version,
    }
    return Outcome(figures=figures, weight_version=version, digest=result["digest"])
