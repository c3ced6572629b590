"""What keeps the chosen plan from being faster: a memory that is full, or the part of the step that takes longest.

Memory binds when the same search with that memory unlimited finds a faster step; the answer names both. Where it does not,
the longest part of the step is named, and of a rollout whether it waits for its longest response.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from miles_plan.passes.base import PassContext
from miles_plan.passes.joint_search import JointChoice
from miles_plan.passes.placements import Split
from miles_plan.passes.rollout_choices import size_engines
from miles_plan.passes.train_choices import overflowing_trainers, passes_per_step, usable_bytes
from miles_plan.passes.train_prices import SizedLayouts
from miles_plan.passes.workload import StepWorkload

WORTH_NAMING = 0.01  # a smaller share of the step is not what binds
NEAR = 0.5  # of a GPU's memory: what is short of more than that, no setting will bring
WAITS_FOR_LONGEST = 0.6  # of a rollout's time that the longest response alone would take
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Faster:
    """A step that a memory forbids, and how many bytes of a GPU it is short of."""

    step_s: float
    missing_bytes: float
    what: str


def binding_constraint(ctx: PassContext, workload: StepWorkload, choice: JointChoice, sized: SizedLayouts) -> str:
    """In one sentence what binds. `sized`: every trainer of the choice's GPUs with its bytes."""
    beyond = _beyond_trainer_memory(ctx, choice, sized)
    pool_s = _without_pool_limit_s(ctx, workload, choice)
    from_trainer_s = choice.step_s - beyond.step_s if beyond is not None else 0.0
    from_rollout_s = choice.rollout.rollout_s - pool_s
    if from_rollout_s > max(from_trainer_s, WORTH_NAMING * choice.step_s):
        return f"memory of the rollout GPUs: with room for every request the rollout would take {pool_s:.3g} s"
    if beyond is not None:
        return (
            f"memory of the training GPUs: {beyond.what} would take {beyond.step_s:.3g} s a step "
            f"and is {beyond.missing_bytes / GIB:.1f} GiB too large"
        )
    return _longest_part(ctx, workload, choice)


def _beyond_trainer_memory(ctx: PassContext, choice: JointChoice, sized: SizedLayouts) -> Faster | None:
    """The trainer nearest to fitting that would make the chosen step faster; None if none is, or none is near."""
    wanted_s = choice.train_s - WORTH_NAMING * choice.step_s
    capacity = min(usable_bytes(group) for group in choice.split.train.cluster.groups)
    table = overflowing_trainers(ctx, sized, wanted_s, (1.0 + NEAR) * capacity)
    seconds = table.rows.step_s + passes_per_step(ctx) * table.rows.log_prob_s
    table_rows = table.rows.take(seconds < wanted_s)
    if not len(table_rows):
        return None
    at = int(np.argmin(table_rows.peak_bytes))
    missing_bytes = float(table_rows.peak_bytes[at]) - capacity
    train_s = float(table_rows.step_s[at] + passes_per_step(ctx) * table_rows.log_prob_s[at])
    return Faster(
        step_s=choice.step_s - choice.train_s + train_s,
        missing_bytes=missing_bytes,
        what=f"train {table.layouts[table_rows.layout[at]]} with {int(table_rows.tokens_per_gpu[at])} tokens a micro-batch",
    )


def _without_pool_limit_s(ctx: PassContext, workload: StepWorkload, choice: JointChoice) -> float:
    """Seconds of the chosen engines' rollout if their cache held whatever they run."""
    sized = size_engines(ctx, choice.split.rollout.cluster, choice.rollout.layout, workload, resident_bytes=0.0)
    if isinstance(sized, str):
        return choice.rollout.rollout_s
    endless = replace(sized.memory, pool_tokens=1 << 48)
    return replace(sized, memory=endless).simulated().rollout_s


def _longest_part(ctx: PassContext, workload: StepWorkload, choice: JointChoice) -> str:
    parts = {
        "rollout": choice.rollout.rollout_s,
        "training": choice.train_s,
        "weight sync": choice.sync_s,
        "moving states between GPU and host": choice.transition_s,
    }
    name, seconds = max(parts.items(), key=lambda part: part[1])
    share = f"{seconds:.3g} of {choice.step_s:.3g} s"
    if name == "rollout":
        alone_s = _longest_response_s(ctx, workload, choice.split, choice)
        if alone_s > WAITS_FOR_LONGEST * seconds:
            return f"time of the rollout, {share}: its longest response alone takes about {alone_s:.3g} s"
    return f"time of the {name}, {share}" if name in ("rollout", "weight sync") else f"time of {name}, {share}"


def _longest_response_s(ctx: PassContext, workload: StepWorkload, split: Split, choice: JointChoice) -> float:
    sized = size_engines(ctx, split.rollout.cluster, choice.rollout.layout, workload, resident_bytes=0.0)
    return 0.0 if isinstance(sized, str) else sized.longest_response_s()
