"""The job spec: everything the user says about one run."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, ValidationInfo, model_validator

from miles_plan.spec.algorithm import AlgorithmSpec
from miles_plan.spec.cluster import ClusterSpec
from miles_plan.spec.data import DataSpec, WarmStartSpec
from miles_plan.spec.execution import Placement, PrecisionSpec, ScheduleSpec, WeightSyncSpec
from miles_plan.spec.model import ModelSpec
from miles_plan.spec.operations import CheckpointSpec, EvaluationSpec, FailuresSpec, TrackingSpec
from miles_plan.spec.rollout import RolloutSpec
from miles_plan.spec.rules import UNKNOWN, breaches
from miles_plan.spec.section import Inert, Section
from miles_plan.spec.train import TrainSpec
from miles_plan.spec.types import Name, Seed


class JobSpec(Section):
    """One RL post-training job."""

    version: Annotated[int, Field(ge=1, le=1), Inert("the loader refuses other versions")]
    """Version of the spec language: 1."""
    name: Name
    """Name of the job: run directories and reports carry it."""
    seed: Seed = 0
    """Seed of everything random in the run."""
    model: ModelSpec
    """The network."""
    cluster: ClusterSpec
    """The machines."""
    algorithm: AlgorithmSpec
    """The learning rule."""
    warm_start: WarmStartSpec | None = None
    """Supervised steps before RL; absent is none."""
    data: DataSpec
    """Prompts and rewards."""
    rollout: RolloutSpec
    """Generation of samples."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """The trainer."""
    placement: Placement = "auto"
    """Rollout engines on the trainer's GPUs (colocate) or on their own (disaggregate, or how many); `auto` compares."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """How rollout and training overlap."""
    precision: PrecisionSpec = Field(default_factory=PrecisionSpec)
    """Number formats and alignment."""
    weight_sync: WeightSyncSpec = Field(default_factory=WeightSyncSpec)
    """How new weights reach the rollout engines."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    """When the run is saved."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """Rollouts that are scored and not trained on."""
    failures: FailuresSpec = Field(default_factory=FailuresSpec)
    """What happens when something breaks."""
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    """Where metrics go."""

    @model_validator(mode="after")
    def _rules_hold(self, info: ValidationInfo) -> Self:
        """A spec that exists is valid. The loader runs the rules itself, to report them with the other mistakes."""
        if not (info.context or {}).get("rules_apart"):
            found = [f"{breach.field}: {breach.message}" for breach in breaches(self.value_at)]
            if found:
                raise ValueError("; ".join(found))
        return self

    def value_at(self, path: str) -> object:
        """The value at a dotted path; `UNKNOWN` where a word or nothing stands instead of the section that holds it."""
        value: object = self
        for step in path.split("."):
            if not isinstance(value, Section):
                return UNKNOWN
            value = getattr(value, step)
        return value
