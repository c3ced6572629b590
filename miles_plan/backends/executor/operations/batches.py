"""What a trainer works on: samples with the columns that other tasks computed, put together in the trainer's own process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from miles_plan.backends.executor.operations.operation import Context
from miles_plan.backends.executor.operations.routing import RoutingRecord
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.tasks import Logprobs

COLUMN_OF_MODEL = {"policy": "old_log_probs", "reference": "reference_log_probs", "teacher": "teacher_log_probs"}


COLUMN_OF_PAYLOAD = {
    "rewards": "reward",
    "advantages": "advantage",
    "importance_weights": "importance_weight",
    "values": "values",
}


def columns_of(context: Context) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and references of the columns that the task's inputs bring, in one order."""
    named: dict[str, Any] = {}
    for each in context.inputs:
        if each.payload == "log_probs" and isinstance(each.src, Logprobs):
            named[COLUMN_OF_MODEL[each.src.model]] = each.value
        elif each.payload in COLUMN_OF_PAYLOAD:
            named[COLUMN_OF_PAYLOAD[each.payload]] = each.value
    return tuple(named), tuple(named.values())


def assembled(
    samples: SampleBatch, routing: RoutingRecord | None, names: tuple[str, ...], columns: tuple[Array, ...]
) -> SampleBatch:
    """The samples with these columns, and with their routing from the record.

    Samples that a filter drew later are not in the record; it checked their own routing, which travels with them. A token whose
    advantage is NaN belongs to a sample whose reward was dropped: it counts nowhere in the loss.
    """
    batch = samples.with_columns(**dict(zip(names, columns, strict=True)))
    advantage = batch.columns.get("advantage")
    if advantage is not None and np.isnan(advantage).any():
        batch = batch.with_columns(advantage=np.nan_to_num(advantage), loss_mask=~np.isnan(advantage))
    if routing is None:
        return replace(batch, routing=None)
    if samples.routing is not None and not routing.covers(samples):
        return replace(batch, routing=samples.routing.astype(routing.experts.dtype, copy=False))
    return replace(batch, routing=routing.of(samples))
