"""Maps a row of serving latency to an engine and prices its time per output token."""

from __future__ import annotations

from miles_plan.cost.decode_time import DecodeModel, serving_time_per_token
from miles_plan.cost.interval import Interval
from miles_plan.cost.profile import profile_for
from miles_plan.cost.validation.row_fields import (
    IncompleteRowError,
    Row,
    row_gpu,
    row_model,
    row_precision,
    seconds_of,
    size_of,
    words_of,
)
from miles_plan.ir.layout import RolloutLayout

_NODE = 4
"""Above so many GPUs the swept rows name tp x ep where attention and experts share the same GPUs."""


def token_seconds(row: Row) -> tuple[Interval, float]:
    """Estimated and measured seconds an output token takes at a steady concurrency.

    Raises:
        UnmappedRowError: another figure, or the load is not stated.
    """
    if (metric := words_of(row, "metric")) != "tpot":
        raise IncompleteRowError(f"{metric} is not a time per output token")
    for name in ("tp", "concurrency", "isl", "osl"):
        if not size_of(row, name, 0):
            raise IncompleteRowError(f"{name} is not stated")
    measured = seconds_of(row, "ms")
    model, gpu = row_model(row), row_gpu(row)
    engine = DecodeModel(
        model=model, layout=serving_layout(row), gpu=gpu, profile=profile_for(gpu), weight_precision=row_precision(row)
    )
    estimate = serving_time_per_token(engine, size_of(row, "concurrency"), size_of(row, "isl"), size_of(row, "osl"))
    return estimate, measured


def serving_layout(row: Row) -> RolloutLayout:
    """The engine's GPUs; attention data parallelism multiplies them.

    AIConfigurator's swept rows give expert tensor and expert parallelism apart. Where both equal each other and their
    product is the stated tp, attention runs on as many GPUs as experts do.
    """
    tp, expert_tp, ep = size_of(row, "tp"), size_of(row, "moe_tp"), size_of(row, "moe_ep")
    if expert_tp == ep > 1 and tp == expert_tp * ep and tp > _NODE:
        tp = ep
    attention = size_of(row, "attention_dp")
    tp *= attention
    return RolloutLayout(tp=tp, ep=ep if tp % ep == 0 else 1, dp_attention=attention)
