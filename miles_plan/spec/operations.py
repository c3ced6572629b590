"""Running and watching a job: `checkpoint`, `evaluation`, `failures`, `tracking`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.data import Prompts
from miles_plan.spec.section import Section
from miles_plan.spec.types import AutoOr, Count, CountOrZero


class CheckpointSpec(Section):
    """When the run is saved."""

    every_steps: AutoOr[Count] = "auto"
    """Steps between checkpoints; `auto` weighs the cost of a save against the work at risk."""
    keep: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Checkpoints kept; the oldest go first."""


class EvaluationSpec(Section):
    """Rollouts that are scored and not trained on."""

    every_steps: CountOrZero = 0
    """Steps between evaluations; 0 is never."""
    prompts: Prompts | None = None
    """A JSONL file, or a generator."""
    samples_per_prompt: Count = 1
    """Samples of one prompt."""


class FailuresSpec(Section):
    """What happens when something breaks."""

    max_restarts: CountOrZero = 3
    """Restarts of an actor before the run stops."""
    deadline_factor: Annotated[float, Field(ge=1, le=10_000)] = 10.0
    """A task is overdue after this multiple of its estimated time."""
    nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """A loss or gradient that is not finite: leave the step out, go back to the last checkpoint, or stop."""


class TrackingSpec(Section):
    """Where metrics go besides the run's JSONL file."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
