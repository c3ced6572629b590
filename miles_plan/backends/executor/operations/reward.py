"""Rewards: the host scores samples in processes that can be killed; what fails is scored by the task's policy and named."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.digests import digest_of_arrays
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, Waiting
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.tasks import Evaluate, Reward

MOST_NAMED = 20  # failures of one batch that the event log names; the figures count them all


def score_samples(
    host: HostTasks, task: Reward | Evaluate, drawn: DrawnPrompts, samples: SampleBatch
) -> tuple[dict[str, Any], Array]:
    """One reward a sample, float32 [N]; NaN for a sample that the policy drops."""
    found = host.score(task, drawn, samples)
    kept = found.scores[found.kept]
    figures = {
        "reward_mean": float(kept.mean()) if len(kept) else 0.0,
        "reward_std": float(kept.std()) if len(kept) else 0.0,
        "reward_failures": len(found.failures),
    }
    figures |= {
        f"reward_{name}_mean": float(np.nanmean(part)) for name, part in found.parts.items() if not np.isnan(part).all()
    }
    report = {
        "digest": digest_of_arrays({"rewards": found.scores}),
        "figures": figures,
        "failures": [f"{failure}, sample id {samples.sample_id[failure.index]}" for failure in found.failures[:MOST_NAMED]],
        "must_stop": found.must_stop,
    }
    return report, found.scores


def scored(context: Context, task: Reward | Evaluate, drawn: Any, samples: Any) -> Waiting[tuple[Any, dict[str, Any]]]:
    """Rewards with their report; failures are written down. RunError where the policy is to stop."""
    calls = context.host.produce(score_samples, task, drawn, samples)
    (report,) = yield Wait(f"host: score samples with {task.reward}", calls)
    if report["failures"]:
        failed = int(report["figures"]["reward_failures"])
        context.event("warning", f"reward {task.reward}", failed_samples=failed, first=report["failures"][:3])
        if report["must_stop"]:
            raise RunError(
                "MP510",
                f"{context.instance}: {task.reward} failed on {int(report['figures']['reward_failures'])} samples; "
                f"first: {report['failures'][0]}",
                help="mend the reward, or set data.reward_failure to 'zero' or 'drop'",
            )
    return calls.values[0], report


def reward(context: Context) -> Operation:
    """Score the rollout's samples."""
    task = context.task
    assert isinstance(task, Reward)
    rewards, report = yield from scored(context, task, context.drawn, context.value("samples"))
    return Outcome(values={"rewards": rewards}, figures=report["figures"], digest=report["digest"])
