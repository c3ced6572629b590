"""Seconds of one reinforcement-learning step from its parts: rollout, log-prob passes, training, weight sync, offload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_plan.cost.interval import Interval, largest, total

Schedule = Literal["colocated", "split", "overlapped"]

ORCHESTRATION = 0.15
"""Time outside the priced parts over the time in them: rewards, packing, moving samples between processes, waiting for
the slowest rank (published steps of NeMo-RL against the sum of their parts)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RlStepParts:
    """Each part over the whole step, in seconds; None = not done. moves: offload and onload of a colocated step."""

    rollout: Interval
    log_prob: Interval | None
    reference: Interval | None
    train: Interval
    sync: Interval
    moves: Interval | None = None


def rl_step_time(parts: RlStepParts, schedule: Schedule) -> Interval:
    """One step.

    colocated and split: parts follow each other. overlapped: the trainer works on the last step's samples while the
    next are generated, so the longer side counts; the sync stops both. What no part prices is a share of their sum.
    """
    trainer = total(
        part.named(name)
        for name, part in (("log_prob", parts.log_prob), ("reference", parts.reference), ("train", parts.train))
        if part is not None
    )
    rollout, sync = parts.rollout.named("rollout"), parts.sync.named("sync")
    if schedule == "overlapped":
        whole = largest((rollout, trainer)) + sync
    else:
        moves = parts.moves.named("moves") if schedule == "colocated" and parts.moves else None
        whole = total(part for part in (rollout, trainer, sync, moves) if part is not None)
    return whole + whole.scaled(ORCHESTRATION).named("orchestration")
