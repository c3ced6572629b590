"""One training step of the speculative draft: on the rollout's samples, with the hidden states of the policy just trained."""

from __future__ import annotations

from dataclasses import replace

from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.operations.digests import digest_of_figures
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, places
from miles_plan.backends.executor.operations.publish import publish
from miles_plan.backends.executor.run_state import publishes
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.tasks import DraftStep, TrainStep


def draft_rank(rank: TrainRank, task: DraftStep, version: int, samples: SampleBatch) -> dict[str, float]:
    """The step on this rank. The policy has moved since the samples' routing was recorded: it routes anew."""
    metrics = rank.at(version).draft_step(replace(samples, routing=None), optimizer=task.optimizer)
    return {name: float(value) for name, value in metrics.items()}


def draft_step(context: Context) -> Operation:
    """Every rank trains its draft, which belongs to the version of the policy that it read.

    Where a later sync asks for that version, policy and draft are published together here, before either moves on.
    """
    task = context.flow.tasks[context.instance.task]
    assert isinstance(task, DraftStep)
    version = context.state.trainer_version
    calls = context.group.call(draft_rank, task, version, context.value("samples"))
    reports = yield Wait(f"{places(context.group)}: train the draft on version {version}", calls)
    graph = context.flow.graph
    if any(publishes(graph, train.name) for train in graph.of_kind(TrainStep) if train.loop == task.loop):
        yield from publish(context, version)
    figures = reports[0]
    return Outcome(
        values={"draft_weights": version}, figures=figures, digest=digest_of_figures(figures), weight_version=version
    )
