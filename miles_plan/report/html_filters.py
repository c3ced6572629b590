"""What templates may do with values: units, intervals, splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from miles_plan.ir.plan import Estimate, TensorTransfer
from miles_plan.ir.tasks import TimeEstimate
from miles_plan.report.run_files import RunFile
from miles_plan.report.units import (
    bytes_text,
    interval_text,
    number_text,
    quantity_text,
    scale_for,
    scaled_text,
    seconds_scale,
    seconds_text,
)
from miles_plan.report.wording import how_often, split_text

PURPOSES = {
    "plan.json": "the plan that was executed",
    "run.json": "what the first start fixed and a resume repeats",
    "journal.sqlite": "every task that was started, completed or failed",
    "journal.sqlite-shm": "of the journal",
    "journal.sqlite-wal": "of the journal",
    "initial": "the weights that the run began with",
    "summary.json": "the results",
    "metrics.jsonl": "one line an iteration",
    "timeline.jsonl": "one line a task run",
    "events.jsonl": "the event log",
    "trace.json": "planned and measured timeline, for ui.perfetto.dev",
    "report.html": "this page",
    "checkpoints": "what a resume starts from; each has its manifest.json",
    "data": "rows that a generator made for this run",
    "final": "the trained policy, a Hugging Face checkpoint",
    "logs": "output of the actors",
    "lock": "who holds the directory",
    "tensorboard": "TensorBoard event files",
}


def time_interval(estimate: TimeEstimate) -> str:
    """`402–811 s` of a task's estimate."""
    scale = seconds_scale(estimate.high_s)
    return f"{interval_text(estimate.low_s, estimate.high_s, scale)}{scale.suffix}"


def expected(estimate: Estimate) -> str:
    """The middle of an estimate, in the unit of its upper end."""
    return scaled_text(estimate.mid, scale_for(estimate.unit, estimate.high))


def bounds(estimate: Estimate) -> str:
    """The interval of an estimate, or that it is exact."""
    if estimate.low == estimate.high:
        return "exact"
    scale = scale_for(estimate.unit, estimate.high)
    return f"{interval_text(estimate.low, estimate.high, scale)}{scale.suffix}"


def buckets(transfer: TensorTransfer) -> str:
    """The buckets that a pattern's tensors travel in."""
    first, last = transfer.first_bucket, transfer.last_bucket
    return str(first) if first == last else f"{first:,}..{last:,}"


def signed_bytes(size_bytes: float) -> str:
    """A size that may be negative."""
    return bytes_text(size_bytes) if size_bytes >= 0 else f"-{bytes_text(-size_bytes)}"


def link(file: RunFile) -> str:
    """A relative address of a file beside the report, which no name can turn into another scheme."""
    return f"./{quote(file.name)}{'/' if file.is_directory else ''}"


def place(location: object) -> str:
    """`file:line:column` of a location in JSON form, or of one that is text already."""
    if not isinstance(location, Mapping):
        return str(location or "")
    return ":".join(str(part) for part in (location.get("file"), location.get("line"), location.get("column")) if part)


FILTERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "seconds": seconds_text,
        "bytes": signed_bytes,
        "number": number_text,
        "quantity": quantity_text,
        "interval": time_interval,
        "expected": expected,
        "bounds": bounds,
        "often": how_often,
        "buckets": buckets,
        "train_split": lambda each: split_text(each.train_axis, each.train_parts),
        "rollout_split": lambda each: split_text(each.rollout_axis, each.rollout_parts),
        "link": link,
        "place": place,
        "purpose": lambda file: PURPOSES.get(file.name, ""),
    }
)
