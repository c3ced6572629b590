"""Whether any point of the space fits: the search's own question, without pricing anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import ANY_SIZES, Sizes
from miles_plan.passes.misfits import misfits
from miles_plan.passes.pair_memory import pair_memory
from miles_plan.passes.pair_prices import open_transports, residue_bytes
from miles_plan.passes.placements import Split, splits
from miles_plan.passes.rollout_choices import open_engines, size_engines
from miles_plan.passes.train_choices import size_trainers
from miles_plan.passes.workload import StepWorkload, step_workload


@dataclass(frozen=True, slots=True)
class AskedSizes:
    """Sizes of the layouts that somebody asks about, beside what the spec fixes."""

    train: Sizes = field(default_factory=lambda: ANY_SIZES)
    rollout: Sizes = field(default_factory=lambda: ANY_SIZES)


ANYTHING = AskedSizes()


def fits(ctx: PassContext, *, generates: bool, asked: AskedSizes = ANYTHING) -> bool:
    """Whether the search would find a plan: nothing that the spec fixes is impossible, and some pair fits its GPUs."""
    try:
        workload = step_workload(ctx)
    except ValueError:  # lengths that contradict each other
        return False
    if any(True for _ in misfits(ctx, workload, generates=generates)):
        return False
    if not generates:
        return bool(size_trainers(ctx, ctx.cluster, ctx.cluster.num_gpus, workload, asked.train).groups)
    return any(_split_fits(ctx, split, workload, asked) for split in splits(ctx) if open_transports(ctx, split))


def _split_fits(ctx: PassContext, split: Split, workload: StepWorkload, asked: AskedSizes) -> bool:
    sized = size_trainers(ctx, split.train.cluster, split.train_gpus, workload, asked.train)
    if not sized.groups:
        return False
    residue = max(residue_bytes(ctx, split, rows) for _, rows in sized.groups)
    cluster = split.rollout.cluster
    layouts = open_engines(ctx, cluster, split.rollout_gpus, workload, asked.rollout)
    sizes = [size_engines(ctx, cluster, layout, workload, resident_bytes=residue) for layout in layouts]
    engines = [each.memory for each in sizes if not isinstance(each, str)]
    return any(pair_memory(ctx, split, workload, rows, engines).fits.any() for _, rows in sized.groups)
