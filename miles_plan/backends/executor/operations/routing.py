"""Rollout routing replay: check and pack what the rollout recorded, hand it to the trainer, and count where it disagrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_plan.backends.executor.operations.digests import digest_of_arrays
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait
from miles_plan.backends.executor.operations.samples import RefusedSamplesError
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.tasks import RecordRouting


@dataclass(frozen=True, slots=True, eq=False)
class RoutingRecord:
    """The experts of every token by sample: sample_id int64 [N], length int32 [N], experts [T, moe_layers, topk]."""

    sample_id: Array
    length: Array
    experts: Array

    def covers(self, batch: SampleBatch) -> bool:
        """Whether every sample of the batch was recorded."""
        return bool(np.isin(batch.sample_id, self.sample_id).all())

    def of(self, batch: SampleBatch) -> Array:
        """Rows for the tokens of `batch`, in its order. RefusedSamplesError for samples not recorded, or of another length."""
        if not self.covers(batch):
            raise RefusedSamplesError("routing was not recorded for every sample that is trained on")
        order = np.argsort(self.sample_id, kind="stable")
        rows = order[np.searchsorted(self.sample_id[order], batch.sample_id)]
        if not np.array_equal(self.length[rows], batch.length):
            raise RefusedSamplesError("routing was recorded for other lengths than those trained on")
        start = np.cumsum(self.length, dtype=np.int64) - self.length
        return np.asarray(self.experts[ragged_rows(start[rows], self.length[rows])])


def routing_problems(batch: SampleBatch, task: RecordRouting) -> list[str]:
    """What is wrong with the routing of a batch: shape, range, the same expert twice, or tokens without rows."""
    routing = batch.routing
    if routing is None:
        return ["no routing was recorded"]
    expected = (batch.num_tokens, len(task.moe_layers), task.topk)
    if routing.shape != expected:
        return [f"routing has the shape {routing.shape}, expected tokens x layers x experts = {expected}"]
    found = []
    used = np.ones(batch.num_tokens, dtype=bool)
    used[batch.start + batch.length - 1] = False  # the last token of a sequence is never fed to the model
    rows = routing[used]
    if rows.size and (int(rows.max()) >= task.num_experts or int(rows.min()) < 0):
        found.append(f"experts {int(rows.min())}..{int(rows.max())}, the model has 0..{task.num_experts - 1}")
    ordered = np.sort(rows, axis=-1)
    if rows.size and task.topk > 1 and (ordered[..., 1:] == ordered[..., :-1]).any():
        repeated = int((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1).sum())
        found.append(f"{repeated} (token, layer) pairs name an expert twice: rows that nobody wrote look like this")
    return found


def pack_routing(host: Any, task: RecordRouting, batch: SampleBatch) -> tuple[dict[str, Any], RoutingRecord]:
    """Check the routing and pack it into the task's type. RefusedSamplesError lists what is wrong."""
    if problems := routing_problems(batch, task):
        raise RefusedSamplesError("; ".join(problems))
    assert batch.routing is not None
    record = RoutingRecord(batch.sample_id, batch.length, batch.routing.astype(task.dtype, copy=False))
    digest = digest_of_arrays({"sample_id": record.sample_id, "experts": record.experts})
    return {"digest": digest, "bytes": record.experts.nbytes}, record


def record_routing(context: Context) -> Operation:
    """Check and pack on the host."""
    task = context.flow.tasks[context.instance.task]
    calls = context.host.produce(pack_routing, task, context.value("routing"))
    (report,) = yield Wait("host: check and pack routing", calls)
    return Outcome(values={"routing": calls.values[0]}, figures={"routing_bytes": report["bytes"]}, digest=report["digest"])


def replay_routing(context: Context) -> Operation:
    """Hand the record on: trainers take their rows from it, and their disagreement is judged where it is counted."""
    yield from ()
    return Outcome(values={"routing": context.value("routing")})
