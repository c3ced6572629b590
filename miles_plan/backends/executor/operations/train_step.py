"""One training step: the batch with its columns on every rank, split into the updates the task asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.operations.batches import assembled, columns_of
from miles_plan.backends.executor.operations.digests import digest_of_figures
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, places
from miles_plan.backends.executor.operations.publish import publish
from miles_plan.backends.executor.operations.routing import RoutingRecord
from miles_plan.backends.executor.run_state import publishes
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.tasks import DraftStep, TrainStep

RENAMED = {  # names that the rollout and the comparison with it have for themselves
    "tokens": "train_tokens",
    "routing_mismatches": "train_routing_mismatches",
    "routing_compared": "train_routing_compared",
}
COUNTS = ("tokens", "skipped_steps", "routing_mismatches", "routing_compared")


def train_rank(
    rank: TrainRank,
    task: TrainStep,
    version: int,
    samples: SampleBatch,
    routing: RoutingRecord | None,
    names: tuple[str, ...],
    *columns: Array,
) -> list[dict[str, float]]:
    """All updates of one training step on this rank; the metrics of each."""
    engine = rank.at(version)
    batch = assembled(samples, routing, names, columns)
    if "old_log_probs" not in batch.columns and task.loss.kind == "policy_gradient":
        batch = batch.with_columns(old_log_probs=batch.rollout_log_probs)
    found = []
    for part in updates_of(batch, task.updates):
        metrics = engine.train_step(
            part,
            loss=task.loss,
            optimizer=task.optimizer,
            replay_routing=task.replay_routing,
            temperature=task.temperature,
        )
        found.append({name: float(value) for name, value in metrics.items()})
    rank.version = version + 1
    return found


def updates_of(batch: SampleBatch, updates: int) -> list[SampleBatch]:
    """The batch in as many parts, each of whole prompts in order, so that a group's advantages meet in one update."""
    if updates == 1:
        return [batch]
    prompts = np.unique(batch.prompt_id, return_index=True)[1]
    order = batch.prompt_id[np.sort(prompts)]
    parts = [order[len(order) * number // updates : len(order) * (number + 1) // updates] for number in range(updates)]
    return [batch.select(np.flatnonzero(np.isin(batch.prompt_id, part))) for part in parts if len(part)]


def train_step(context: Context) -> Operation:
    """Every rank trains; where a later sync asks for these weights, they are published before the next step changes them."""
    task = context.flow.tasks[context.instance.task]
    assert isinstance(task, TrainStep)
    state, (names, columns) = context.state, columns_of(context)
    version = state.trainer_version
    calls = context.group.call(train_rank, task, version, context.value("samples"), context.value("routing"), names, *columns)
    reports = yield Wait(f"{places(context.group)}: train on version {version}", calls)
    state.trainer_version = version + 1
    state.weights_made[context.instance] = version + 1
    figures = {RENAMED.get(name, name): figure for name, figure in merged(reports[0]).items()}
    if task.nonfinite != "skip" and figures.get("skipped_steps"):
        raise _nonfinite(context, task)
    drafted = any(each.loop == task.loop for each in context.flow.graph.of_kind(DraftStep))  # published with its draft
    if publishes(context.flow.graph, task.name) and not drafted:
        yield from publish(context, version + 1)
    return Outcome(
        values={"weights": version + 1}, figures=figures, digest=digest_of_figures(figures), weight_version=version + 1
    )


def merged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: counts add up, the rest is averaged."""
    names = list(dict.fromkeys(name for update in updates for name in update))
    sums = {name: math.fsum(update.get(name, 0.0) for update in updates) for name in names}
    return {name: total if name in COUNTS else total / len(updates) for name, total in sums.items()}


def _nonfinite(context: Context, task: TrainStep) -> Exception:
    message = f"{context.instance}: loss or gradient is not finite"
    if task.nonfinite == "rollback":
        return FloatingPointError(message)
    return RunError("MP511", message, help="lower train.optimizer.lr, or set failures.nonfinite to 'skip' or 'rollback'")
