"""The learning rate of each step."""

from __future__ import annotations

import math

from miles_plan.ir.options import OptimizerOptions


def learning_rate(options: OptimizerOptions, steps_taken: int) -> float:
    """Rate of the next step: linear warm-up over `warmup_steps`, then down to `min_learning_rate` at `total_steps`.

    ValueError for a decaying schedule whose total_steps do not reach beyond the warm-up.
    """
    peak, floor = options.learning_rate, options.min_learning_rate
    if steps_taken < options.warmup_steps:
        return peak * (steps_taken + 1) / options.warmup_steps
    if options.schedule == "constant":
        return peak
    span = options.total_steps - options.warmup_steps
    if span < 1:
        raise ValueError(
            f"schedule '{options.schedule}' needs total_steps > warmup_steps, "
            f"got {options.total_steps} and {options.warmup_steps}"
        )
    progress = min((steps_taken - options.warmup_steps) / span, 1.0)
    remaining = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * remaining
