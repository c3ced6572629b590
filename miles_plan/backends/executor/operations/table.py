"""Which operation runs which kind of task. What is missing here is refused before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from miles_plan.backends.executor.operations.advantage import advantage, correct
from miles_plan.backends.executor.operations.buffer import buffer
from miles_plan.backends.executor.operations.checkpoint import checkpoint
from miles_plan.backends.executor.operations.draft_step import draft_step
from miles_plan.backends.executor.operations.evaluate import evaluate
from miles_plan.backends.executor.operations.filter_groups import filter_groups
from miles_plan.backends.executor.operations.logprobs import logprobs
from miles_plan.backends.executor.operations.operation import Context, Operation
from miles_plan.backends.executor.operations.prompts import prompts
from miles_plan.backends.executor.operations.residency import residency
from miles_plan.backends.executor.operations.reward import reward
from miles_plan.backends.executor.operations.rollout import rollout
from miles_plan.backends.executor.operations.routing import record_routing, replay_routing
from miles_plan.backends.executor.operations.train_step import train_step
from miles_plan.backends.executor.operations.weight_sync import weight_sync

OPERATIONS: Mapping[str, Callable[[Context], Operation]] = MappingProxyType(
    {
        "prompts": prompts,
        "rollout": rollout,
        "reward": reward,
        "filter_groups": filter_groups,
        "record_routing": record_routing,
        "replay_routing": replay_routing,
        "logprobs": logprobs,
        "advantage": advantage,
        "correct": correct,
        "buffer": buffer,
        "train_step": train_step,
        "draft_step": draft_step,
        "weight_sync": weight_sync,
        "offload": residency,
        "onload": residency,
        "checkpoint": checkpoint,
        "evaluate": evaluate,
    }
)
