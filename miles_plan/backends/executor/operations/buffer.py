"""The buffer between asynchronous rollout and training. The dataflow bounds how much waits; how old it is is checked here."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.operations.digests import digest_of_batch
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.tasks import Buffer


def fresh_samples(host: Any, version: int, max_staleness: int, samples: SampleBatch) -> tuple[dict[str, Any], SampleBatch]:
    """The samples whose every token is at most `max_staleness` training steps older than the weights they will train."""
    oldest = np.full(samples.num_samples, version, dtype=np.int64)
    owner = np.repeat(np.arange(samples.num_samples), samples.response_length)
    np.minimum.at(oldest, owner, samples.weight_version)
    staleness = version - oldest
    kept = np.flatnonzero(staleness <= max_staleness)
    batch = samples if len(kept) == samples.num_samples else samples.select(kept)
    figures = {
        "staleness_mean": float(staleness.mean()),
        "staleness_max": int(staleness.max(initial=0)),
        "samples_dropped_as_stale": samples.num_samples - len(kept),
    }
    return {"digest": digest_of_batch(batch), "figures": figures}, batch


def buffer(context: Context) -> Operation:
    """Hand samples on to the training step of this iteration, which trains on the version that the step before it makes."""
    task = context.task
    assert isinstance(task, Buffer)
    version = context.state.version_before(context.flow, task.loop, context.instance.iteration)
    calls = context.host.produce(fresh_samples, version, task.max_staleness, context.value("samples"))
    (report,) = yield Wait("host: check how old the samples are", calls)
    if dropped := report["figures"]["samples_dropped_as_stale"]:
        raise RunError(
            "MP513",
            f"{context.instance}: {dropped} samples are older than {task.max_staleness} versions",
            help="the plan's edges should rule this out: please report it",
        )
    values: dict[Any, Any] = {"samples": calls.values[0]}
    values |= {each.payload: each.value for each in context.inputs if each.payload in ("routing", "rewards")}
    values |= {"prompts": context.drawn}
    return Outcome(values=values, figures=report["figures"], digest=report["digest"])
