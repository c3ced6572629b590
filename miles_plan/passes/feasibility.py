"""Whether any point of the space fits: the search's own question, without pricing anything."""

from __future__ import annotations

from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import rollout_layouts, rollout_obstacles
from miles_plan.passes.misfits import misfits
from miles_plan.passes.pair_memory import pair_memory
from miles_plan.passes.pair_prices import open_transports, residue_bytes
from miles_plan.passes.placements import Split, splits
from miles_plan.passes.rollout_choices import asked_engines, rollout_room, size_engines
from miles_plan.passes.train_choices import size_trainers
from miles_plan.passes.workload import StepWorkload, step_workload


def fits(ctx: PassContext, *, generates: bool) -> bool:
    """Whether the search would find a plan: nothing that the spec fixes is impossible, and some pair fits its GPUs."""
    try:
        workload = step_workload(ctx)
    except ValueError:  # lengths that contradict each other
        return False
    if any(True for _ in misfits(ctx, workload, generates=generates)):
        return False
    if not generates:
        return bool(size_trainers(ctx, ctx.cluster, ctx.cluster.num_gpus, workload).groups)
    possible = list(splits(ctx))
    reached = [split for split in possible if open_transports(ctx, split)]
    return any(_split_fits(ctx, split, workload) for split in reached)


def _split_fits(ctx: PassContext, split: Split, workload: StepWorkload) -> bool:
    sized = size_trainers(ctx, split.train.cluster, split.train_gpus, workload)
    if not sized.groups:
        return False
    residue = max(residue_bytes(ctx, split, rows) for _, rows in sized.groups)
    cluster, num_gpus = split.rollout.cluster, split.rollout_gpus
    room, fixed = rollout_room(ctx, cluster, num_gpus, workload), asked_engines(ctx, num_gpus)
    if fixed is None:
        layouts = rollout_layouts(ctx.model, room)
    else:
        layouts = [] if any(rollout_obstacles(fixed, ctx.model, room)) else [fixed]
    sizes = [size_engines(ctx, cluster, layout, workload, resident_bytes=residue) for layout in layouts]
    engines = [each.memory for each in sizes if not isinstance(each, str)]
    return any(pair_memory(ctx, split, workload, rows, engines).fits.any() for _, rows in sized.groups)
