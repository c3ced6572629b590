"""summary.json: the figures of a run that anyone asks for first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from miles_plan.ir.plan import Plan

EDGE_ITERATIONS = 3


def run_summary(
    plan: Plan,
    metrics: Sequence[Mapping[str, Any]],
    *,
    wall_s: float,
    restarts: int,
    final_weights_sha256: str | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary of a run.

    steps: iterations of the last loop that are done. reward_first and reward_last: mean reward over the first and over the last
    three iterations of the last loop (all of them where there are fewer), so after any warm start; null without rewards.
    max_abs_logprob_diff: the largest difference between a token's log-prob in rollout and trainer over the whole run, over
    tokens_compared tokens; null where nothing was compared. restarts: tasks retried, engines rebuilt, roll-backs and resumes.
    """
    last_loop = plan.graph.loops[-1].name
    lines = [line for line in metrics if line["loop"] == last_loop]
    rewards = [line["reward_mean"] for line in lines if "reward_mean" in line]
    differences = [line["max_abs_log_prob_diff"] for line in metrics if line.get("tokens_compared")]
    return {
        "seed": plan.run.seed,
        "steps": len(lines),
        "wall_s": round(wall_s, 3),
        "reward_first": _mean(rewards[:EDGE_ITERATIONS]),
        "reward_last": _mean(rewards[-EDGE_ITERATIONS:]),
        "max_abs_logprob_diff": max(differences) if differences else None,
        "tokens_compared": int(sum(line.get("tokens_compared", 0) for line in metrics)),
        "routing_mismatches": int(sum(line.get("routing_mismatches", 0) for line in metrics)),
        "restarts": restarts,
        "final_weights_sha256": final_weights_sha256,
        "details": {"rule": f"rewards are means over {EDGE_ITERATIONS} iterations of loop '{last_loop}'", **details},
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
