"""Which alignment a job gets, and what stands between it and equal bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from miles_plan.passes.base import PassContext
from miles_plan.passes.number_formats import ANY_CHIP, HOPPER

Alignment = Literal["exact", "replay", "corrected", "off"]

# Engine pairs whose every op can run on one set of kernels, and the chips those kernels are made for.
SHARED_KERNELS: dict[tuple[str, str], frozenset[str]] = {
    ("torch", "torch"): ANY_CHIP,
    ("megatron", "sglang"): HOPPER,
}


def choose_alignment(ctx: PassContext) -> tuple[Alignment, str]:
    """The alignment asked for, or under `auto` the strictest that costs nothing; with the reason."""
    asked = ctx.job.precision.alignment
    if asked != "auto":
        return asked, "the spec asks for it"
    if ctx.job.train.engine == "torch" and ctx.job.rollout.engine == "torch" and not any(exact_obstacles(ctx)):
        return "exact", "both engines run the same batch-invariant kernels"
    if ctx.job.precision.rollout != ctx.job.precision.train:
        return "corrected", "the two sides compute in different formats, so importance weights correct the difference"
    if ctx.model.moe is not None:
        return "replay", "a mixture-of-experts model on two engines: routing is replayed, the rest stays small"
    return "corrected", "two engines differ in kernels; importance weights correct the difference at no extra forward pass"


def exact_obstacles(ctx: PassContext) -> Iterator[tuple[str, str, str]]:
    """What stands between this job and equal bits: (spec field, what is wrong, what to do)."""
    job = ctx.job
    chips = SHARED_KERNELS.get((job.train.engine, job.rollout.engine))
    if chips is None:
        pair = f"{job.train.engine} and {job.rollout.engine}"
        yield "precision.alignment", f"{pair} share no batch-invariant kernels", "use replay or corrected"
    elif chips and not {group.gpu.name for group in ctx.cluster.groups} <= chips:
        yield "precision.alignment", f"the shared kernels are made for {', '.join(sorted(chips))}", "use replay or corrected"
    if job.precision.train != job.precision.rollout:
        yield (
            "precision.rollout",
            f"the trainer computes in {job.precision.train}, the rollout in {job.precision.rollout}",
            "give both the same format",
        )
    if job.precision.kv_cache not in ("auto", job.precision.rollout):
        yield (
            "precision.kv_cache",
            f"a {job.precision.kv_cache} KV cache rounds keys and values that the trainer does not",
            "leave kv_cache: auto",
        )
    if job.schedule.mode in ("one_step_off", "asynchronous"):
        yield (
            "schedule.mode",
            "samples are older than the weights that score them, so log-probs differ by training, not by rounding",
            "use schedule.mode: synchronous, or alignment: replay or corrected",
        )
