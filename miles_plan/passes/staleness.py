"""How far samples may lag behind the weights they train: asked by the search, by placement, and where distances are set."""

from __future__ import annotations

from miles_plan.passes.base import PassContext

DEFAULT_STALENESS = {"synchronous": 0, "one_step_off": 1, "asynchronous": 2}


def staleness_of(ctx: PassContext) -> tuple[str, int]:
    """The schedule's mode with `auto` settled, and how many versions samples may lag."""
    mode = "synchronous" if ctx.job.schedule.mode == "auto" else ctx.job.schedule.mode
    asked = ctx.job.schedule.max_staleness
    return mode, DEFAULT_STALENESS[mode] if asked == "auto" else asked
