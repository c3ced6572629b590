"""Holds every estimate against rows of published or measured figures: the `validate` command and the accuracy tests.

A row is one JSON object: a published figure (`kind`, `metric`, `value`, `unit`, sizes), a measured Megatron run
(`config`, `ranks`), or a launch configuration (`raw_args`). Each becomes a job with the layout it states; one that
cannot is counted with its reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miles_plan.cost.interval import Interval
from miles_plan.cost.validation.launch_rows import check_launch, is_launch_row
from miles_plan.cost.validation.megatron_rows import check_megatron, is_megatron_row
from miles_plan.cost.validation.memory_rows import peak_bytes, said_to_fit
from miles_plan.cost.validation.report import Checked, Launched, RanOut, Unmapped, ValidationReport
from miles_plan.cost.validation.rl_rows import rl_step_seconds
from miles_plan.cost.validation.row_fields import IncompleteRowError, UnmappedRowError, figure_of
from miles_plan.cost.validation.serving_rows import token_seconds
from miles_plan.cost.validation.sync_rows import sync_seconds
from miles_plan.cost.validation.train_rows import step_seconds

Row = Mapping[str, Any]

_ESTIMATES: dict[str, tuple[str, Callable[[Row], tuple[Interval, float]]]] = {
    "train_throughput": ("training step time", step_seconds),
    "memory": ("training memory", peak_bytes),
    "inference_throughput": ("decode time per token", token_seconds),
    "rl_step_time": ("RL step time", rl_step_seconds),
    "weight_sync": ("weight sync", sync_seconds),
}
NOT_ESTIMATED = frozenset({"search_time"})
"""Kinds of rows that record other tools' own speed."""
_RATES = re.compile(r"per_s|throughput|MFU|tflops", re.IGNORECASE)
_ANCHOR = re.compile(r"^(\w+?)_predicted\w*$|^(estimator)_total_gb$|^(second)_column$")


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of rows, one JSON object a line.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
            raise ValueError(f"{place}: not JSON that can be read ({type(error).__name__})") from error
        if text and not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object")
        if isinstance(row, dict):
            rows.append(PlacedRow(row, place))
    return rows


class PlacedRow(dict[str, Any]):
    """A row that knows its file and line."""

    def __init__(self, row: Mapping[str, Any], place: str) -> None:
        super().__init__(row)
        self.place = place


def validate(rows: Iterable[Row]) -> ValidationReport:
    """Estimate every row that can be mapped and compare."""
    checked: list[Checked] = []
    launched: list[Launched] = []
    ran_out: list[RanOut] = []
    unmapped: list[Unmapped] = []
    for number, row in enumerate(rows):
        kind, place = _kind(row), getattr(row, "place", f"row {number + 1}")
        try:
            if is_launch_row(row):
                launched.append(_launched(row))
            else:
                with np.errstate(all="ignore"):  # what a row's absurd sizes make of a figure is looked at below
                    verdicts = list(_ran_out(number, row))
                    ran_out += verdicts
                    checked += _figures(number, row, kind, bool(verdicts))
        except UnmappedRowError as reason:
            unmapped.append(Unmapped(kind, number, str(reason), isinstance(reason, IncompleteRowError), place))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            fault = f"the row is malformed: {type(error).__name__}: {error}"
            unmapped.append(Unmapped(kind, number, fault, True, place))
    return ValidationReport(tuple(checked), tuple(launched), tuple(ran_out), tuple(unmapped))


def _kind(row: Row) -> str:
    if is_launch_row(row):
        return "launch configuration"
    if is_megatron_row(row):
        return "Megatron run"
    name = str(row.get("kind") or "unknown")
    return _ESTIMATES[name][0] if name in _ESTIMATES else name


def _launched(row: Row) -> Launched:
    check = check_launch(row)
    return Launched(str(row.get("id") or row.get("path")), check.gpu.name, check.gpu_stated, check.fits, check.defect)


def _figures(number: int, row: Row, kind: str, ran_out: bool) -> list[Checked]:
    """What a row measured; a run that ran out of memory may have measured nothing."""
    try:
        return list(_checked(number, row, kind))
    except IncompleteRowError:
        if ran_out:
            return []
        raise


def _checked(number: int, row: Row, kind: str) -> Iterator[Checked]:
    if is_megatron_row(row):
        for each in check_megatron(row):
            error = _error(each.estimate, each.measured)
            yield Checked(f"Megatron {each.what}", "measured", number, error, each.estimate.holds(each.measured))
        return
    name = str(row.get("kind"))
    if name in NOT_ESTIMATED:
        raise IncompleteRowError("not a figure of a job")
    if not row.get("kind"):
        raise IncompleteRowError("its kind is not stated")
    if name not in _ESTIMATES:
        raise UnmappedRowError(f"no estimate of kind {name!r}")
    estimate, truth = _ESTIMATES[name][1](row)
    anchors = tuple(_anchors(row))
    yield Checked(kind, _source(row), number, _error(estimate, truth), estimate.holds(truth), anchors)


def _error(estimate: Interval, truth: float) -> float:
    if not truth > 0:
        raise IncompleteRowError("the value is not a positive number")
    error = estimate.mid / truth - 1.0
    if not estimate.mid > 0 or not math.isfinite(error):
        raise IncompleteRowError("its sizes make no figure")
    return error


def _ran_out(number: int, row: Row) -> Iterator[RanOut]:
    if row.get("kind") in ("memory", "train_throughput") and (verdict := said_to_fit(row)) is not None:
        modules = f", recompute {row['recompute']}" if row.get("recompute") else ""
        yield RanOut(number, f"{row.get('model')} on {row.get('hardware')}{modules}: {row.get('notes')}", verdict)


def _source(row: Row) -> str:
    """Project and document, without commit, date, or the item of a collection."""
    text = str(row.get("source") or "unknown").removeprefix("github.com/").removeprefix("https://")
    text = re.sub(r"\s*[@(\[].*$", "", text).strip()
    return re.sub(r"(/model_verification_cards)/.*", r"\1", text) or "unknown"


def _anchors(row: Row) -> Iterator[tuple[str, float]]:
    """Other tools' errors on the same row; of a rate, the error of the time it stands for."""
    for name, value in row.items():
        match = _ANCHOR.match(name)
        if not match or not isinstance(value, int | float) or not value > 0:
            continue
        tool = next(group for group in match.groups() if group)
        truth, theirs = figure_of(row, "value"), figure_of(row, name)
        yield tool, (truth / theirs if _RATES.search(str(row.get("metric"))) else theirs / truth) - 1.0
