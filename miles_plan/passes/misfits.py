"""What the spec fixes and the cluster, the model or the engines cannot do: said before anything is searched."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plan.diagnostics import Diagnostic
from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import rollout_obstacles, train_obstacles
from miles_plan.passes.number_formats import format_misfits
from miles_plan.passes.rollout_choices import asked_engines, rollout_room
from miles_plan.passes.staleness import staleness_of
from miles_plan.passes.train_choices import asked_layout, train_room
from miles_plan.passes.workload import StepWorkload
from miles_plan.spec.execution import SplitPlacement

LAYOUT_HELP = "layout: auto finds one that fits"


def misfits(ctx: PassContext, workload: StepWorkload, *, generates: bool) -> Iterator[Diagnostic]:
    """What the spec fixes and the cluster, the model or the engine cannot do."""
    num_gpus = ctx.cluster.num_gpus
    train_gpus = rollout_gpus = num_gpus
    asked = ctx.job.placement
    if isinstance(asked, SplitPlacement):
        train_gpus, rollout_gpus = num_gpus - asked.rollout_gpus, asked.rollout_gpus
        if train_gpus < 1:
            yield ctx.error(
                "MP203",
                f"{asked.rollout_gpus} rollout GPUs of {num_gpus} leave none to train on",
                "placement.rollout_gpus",
                help=f"use at most {num_gpus - 1}, or placement: colocate",
            )
            return
    if staleness_of(ctx)[1] and num_gpus < 2:
        yield ctx.error(
            "MP210",
            f"{ctx.job.schedule.mode} overlaps rollout and training, and there is one GPU for both",
            "schedule.mode",
            help="use schedule.mode: synchronous, or more GPUs",
        )
    yield from _engine_misfits(ctx)
    yield from format_misfits(ctx, generates=generates)
    apart = asked in ("auto", "disaggregate")
    layout = asked_layout(ctx, train_gpus)
    if layout is not None:
        # Where the split is open the trainer may take part of the cluster: only what is wrong at any size counts.
        room = min(layout.world_size, train_gpus) if apart else train_gpus
        for obstacle in train_obstacles(layout, ctx.model, train_room(ctx, ctx.cluster, room, workload)):
            yield ctx.error("MP201", f"train.layout {layout}: {obstacle}", "train.layout", help=LAYOUT_HELP)
    engines = asked_engines(ctx, rollout_gpus)
    if engines is not None and generates:
        for obstacle in rollout_obstacles(engines, ctx.model, rollout_room(ctx, ctx.cluster, rollout_gpus, workload)):
            yield ctx.error("MP202", f"rollout.layout {engines}: {obstacle}", "rollout.layout", help=LAYOUT_HELP)
    budget = ctx.job.train.tokens_per_gpu
    cp = layout.cp if layout is not None else 1
    if budget != "auto" and layout is not None and budget * cp < workload.longest_tokens:
        yield ctx.error(
            "MP204",
            f"the longest sequence has {workload.longest_tokens} tokens, tokens_per_gpu x cp = {budget} x {cp} = {budget * cp}",
            "train.tokens_per_gpu",
            help=f"use at least {-(-workload.longest_tokens // cp)}, or a larger cp",
        )


def _engine_misfits(ctx: PassContext) -> Iterator[Diagnostic]:
    """Engines that do not run on this kind of device, or need what the spec does not give."""
    on_cpu = ctx.cluster.groups[0].gpu.vendor == "cpu"
    for side, engine in (("train", ctx.job.train.engine), ("rollout", ctx.job.rollout.engine)):
        if on_cpu and engine != "torch":
            yield ctx.error(
                "MP401",
                f"{engine} needs GPUs, the cluster is of kind '{ctx.cluster.groups[0].gpu.name}'",
                f"{side}.engine",
                help=f"use {side}.engine: torch, or name the cluster's GPU",
            )
