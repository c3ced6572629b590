"""What a plan says about its trainer, in the terms that trainers are built from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import Recompute, TrainLayout
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import DraftStep, Logprobs, TrainStep

DEFAULT_MICRO_BATCH_TOKENS = 8192
_DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16", "fp8_blockwise": "bfloat16"}
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerFacts:
    """One trainer of a plan. dtype: of activations, None for a precision that no trainer here computes in; exact: the plan
    promises the same bits as the rollout."""

    layout: TrainLayout
    dtype: Literal["float32", "bfloat16"] | None
    fp8: bool
    micro_batch_tokens: int
    recompute: Recompute
    keep_reference: bool
    teacher: bool
    draft: bool
    optimizer_offload: bool
    exact: bool
    device: Literal["cpu", "cuda"]
    seed: int


def trainer_facts(plan: Plan, group: DeviceGroup) -> TrainerFacts:
    """The facts of the trainer that owns `group`."""
    assert group.train_layout is not None, "a train group has a train layout"
    steps = [cast(TrainStep, task) for task in plan.graph.of_kind(TrainStep)]
    scorings = [cast(Logprobs, task) for task in plan.graph.of_kind(Logprobs)]
    models = {task.model for task in scorings}
    return TrainerFacts(
        layout=group.train_layout,
        dtype=_DTYPES.get(plan.run.train_dtype),
        fp8=plan.run.train_dtype == "fp8_blockwise",
        micro_batch_tokens=_tightest([*(task.tokens_per_gpu for task in steps), *(task.tokens_per_gpu for task in scorings)]),
        recompute=max((task.recompute for task in steps), key=_RECOMPUTE.index, default="none"),
        keep_reference="reference" in models,
        teacher="teacher" in models,
        draft=bool(plan.graph.of_kind(DraftStep)),
        optimizer_offload=any(task.optimizer_offload for task in steps),
        exact=any(each.field == "precision.alignment" and each.value == "exact" for each in plan.decisions),
        device="cpu" if plan.cluster.gpu == "cpu" else "cuda",
        seed=plan.run.seed,
    )


def _tightest(stated: Iterable[int]) -> int:
    """The least token budget that a task states: an engine has one for all of them."""
    return min((tokens for tokens in stated if tokens), default=DEFAULT_MICRO_BATCH_TOKENS)
