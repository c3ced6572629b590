"""Number formats: which of trainer and rollout may meet, on which chips, and what the cost models call them.

The pairs are Miles' support matrix (docs/advanced/low-precision.md there). Prices need formats that exist, so this is checked
before anything is placed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from miles_plan.diagnostics import Diagnostic
from miles_plan.passes.base import PassContext

HOPPER = frozenset({"h100", "h200", "h20"})
BLACKWELL = frozenset({"b200", "b300", "gb200", "gb300", "gb10"})
ANY_CHIP: frozenset[str] = frozenset()

# (rollout, train) -> chips that have it; ANY_CHIP = all.
PAIRS: dict[tuple[str, str], frozenset[str]] = {
    ("fp32", "fp32"): ANY_CHIP,
    ("bf16", "bf16"): ANY_CHIP,
    ("fp8_blockwise", "bf16"): HOPPER | BLACKWELL,
    ("fp8_blockwise", "fp8_blockwise"): HOPPER | BLACKWELL,
    ("mxfp8", "bf16"): BLACKWELL,
    ("mxfp8", "mxfp8"): BLACKWELL,
    ("nvfp4", "nvfp4"): BLACKWELL,
    ("int4", "int4_qat"): ANY_CHIP,
}

# Names of number formats in the spec and in the cost models.
COST_PRECISION: dict[str, Literal["bf16", "fp32", "fp8", "mxfp8", "nvfp4"]] = {
    "bf16": "bf16",
    "fp32": "fp32",
    "fp8_blockwise": "fp8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "int4_qat": "bf16",
}
ROLLOUT_PRECISION = {"bf16": "bf16", "fp32": "fp32", "fp8_blockwise": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int4": "int4"}
# Bytes of an element with its scales: fp32 a 128 x 128 block; a byte a block of 32; a byte a block of 16; bf16 a group of 32.
DTYPE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8_blockwise": 1.0 + 4.0 / (128 * 128),
    "mxfp8": 1.0 + 1.0 / 32,
    "nvfp4": 0.5 + 1.0 / 16,
    "int4": 0.5 + 2.0 / 32,
}
KV_BYTES = {"bf16": 2.0, "fp32": 4.0, "fp8": 1.0}


def format_misfits(ctx: PassContext, *, generates: bool) -> Iterator[Diagnostic]:
    """Formats that the engine does not compute in and, for jobs that generate, that cannot meet or that the chip lacks."""
    yield from _engine_misfits(ctx, ("train", "rollout") if generates else ("train",))
    if generates:
        yield from _pair_misfits(ctx)


def _pair_misfits(ctx: PassContext) -> Iterator[Diagnostic]:
    job = ctx.job
    chips = PAIRS.get((job.precision.rollout, job.precision.train))
    used = {group.gpu.name for group in ctx.cluster.groups}
    if chips is None:
        allowed = sorted(train for rollout, train in PAIRS if rollout == job.precision.rollout)
        yield ctx.error(
            "MP301",
            f"a {job.precision.rollout} rollout cannot be paired with {job.precision.train} training",
            "precision.rollout",
            help=f"with rollout: {job.precision.rollout}, train may be {' or '.join(allowed)}",
        )
    elif chips and not used <= chips:
        yield ctx.error(
            "MP302",
            f"{', '.join(sorted(used - chips))} cannot compute in {job.precision.rollout}",
            "precision.rollout",
            help=f"{job.precision.rollout} needs {', '.join(sorted(chips))}; bf16 runs everywhere",
        )


def _engine_misfits(ctx: PassContext, sides: tuple[str, ...]) -> Iterator[Diagnostic]:
    for side in sides:
        dtype = getattr(ctx.job.precision, side)
        if getattr(ctx.job, side).engine == "torch" and dtype not in ("bf16", "fp32"):
            yield ctx.error(
                "MP303",
                f"the torch engine computes in bf16 or fp32, not {dtype}",
                f"precision.{side}",
                help="use bf16 or fp32, or the megatron and sglang engines",
            )
