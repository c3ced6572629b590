"""What a validation found: errors by kind and source, interval coverage, anchors beside them, and what was not mapped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

NEEDED_MAPPED_SHARE = 0.9
"""Of the rows that state their layout; mapping fewer fails the validation."""


GOALS = {
    "Megatron peak memory": "median 1.5 %, worst 5 %",
    "training memory": "median 4 %, worst 15 %",
    "training step time": "median 8 %, p90 20 %",
    "decode time per token": "median 10 %",
    "RL step time": "median 15 %",
    "weight sync": "median 20 %",
}
"""What each kind of estimate is meant to reach."""

_HEADER = """\
# Accuracy of the estimates

Every estimate held against published and measured figures, each mapped to a job with the layout its row states and priced
by the same models as a plan, with no constant fitted to a single row. Written by
`miles-plan validate --out docs/accuracy.md FILE...`; how the models work is in [cost-models.md](cost-models.md).

Errors are estimate over truth less one: their absolute median, 90th percentile and worst, and their signed median (bias).
The interval is the one printed with every estimate, meant to hold nine truths in ten.

What others say of themselves, for scale: SimuMax places step times within 13.5 % and memory within 1.4 % on one node of
eight GPUs; AIConfigurator's own public rows give it a median error of 21 % on serving latency; Charon and Lumos state 3
to 5 % on step time, closed or from a trace.
"""


@dataclass(frozen=True, slots=True)
class Checked:
    """One figure held against the truth. error: estimate / truth - 1; anchors: the same of other tools' predictions."""

    kind: str
    source: str
    row: int
    error: float
    held: bool
    anchors: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch configuration: whether it was said to fit, and what speaks against it."""

    name: str
    gpu: str
    gpu_stated: bool
    fits: bool
    defect: str


@dataclass(frozen=True, slots=True)
class RanOut:
    """A run that ran out of memory, and whether a plan would have taken it."""

    row: int
    name: str
    said_to_fit: bool


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A row left out. incomplete: the row leaves out what a job needs, so that leaving it out is not our failure.
    place: its file and line, or its number."""

    kind: str
    row: int
    reason: str
    incomplete: bool
    place: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of one group of rows, as shares: median, 90th percentile and worst of |error|, median signed error."""

    kind: str
    source: str
    n: int
    median: float
    p90: float
    worst: float
    bias: float
    coverage: float


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """The outcome over one or more files of rows."""

    checked: tuple[Checked, ...]
    launched: tuple[Launched, ...]
    ran_out: tuple[RanOut, ...]
    unmapped: tuple[Unmapped, ...]

    @property
    def kinds(self) -> tuple[Summary, ...]:
        """One summary a kind of figure."""
        return tuple(_summaries(self.checked, lambda each: (each.kind, "all")))

    @property
    def sources(self) -> tuple[Summary, ...]:
        """One summary a kind and source."""
        return tuple(_summaries(self.checked, lambda each: (each.kind, each.source)))

    @property
    def anchors(self) -> tuple[tuple[Summary, Summary], ...]:
        """For each other tool with predictions on the same rows: its summary, and ours on those rows."""
        names = sorted({name for each in self.checked for name, _ in each.anchors})
        pairs = []
        for name in names:
            rows = [each for each in self.checked if name in dict(each.anchors)]
            theirs = [Checked(each.kind, name, each.row, dict(each.anchors)[name], False) for each in rows]
            ours = next(_summaries(rows, lambda each: (each.kind, "miles-plan")))
            pairs.append((next(_summaries(theirs, lambda each: (each.kind, each.source))), ours))
        return tuple(pairs)

    @property
    def mapped_share(self) -> float:
        """Rows that became a job over rows that state all a job needs."""
        mapped = len({(each.kind, each.row) for each in self.checked}) + len(self.launched)
        failed = sum(1 for each in self.unmapped if not each.incomplete)
        return mapped / (mapped + failed) if mapped + failed else 1.0

    @property
    def ok(self) -> bool:
        """Whether enough rows were mapped."""
        return self.mapped_share >= NEEDED_MAPPED_SHARE

    def to_json(self) -> dict[str, Any]:
        """Plain figures for machines."""
        return {
            "ok": self.ok,
            "mapped_share": self.mapped_share,
            "kinds": [asdict(each) for each in self.kinds],
            "sources": [asdict(each) for each in self.sources],
            "anchors": [{"anchor": asdict(theirs), "own": asdict(ours)} for theirs, ours in self.anchors],
            "launches": [asdict(each) for each in self.launched],
            "ran_out": [asdict(each) for each in self.ran_out],
            "unmapped": [asdict(each) for each in self.unmapped],
        }

    def markdown(self) -> str:
        """The same as a page of tables."""
        parts = [
            _HEADER,
            "| kind | rows | median | p90 | worst | bias | in the 90 % interval | goal |",
            "|---|---|---|---|---|---|---|---|",
            *(f"{_row(each.kind, each)} {GOALS.get(each.kind, '')} |" for each in self.kinds),
            "",
            "## By source",
            "",
            "| kind | source | rows | median | p90 | worst | bias | in the 90 % interval |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(f"{each.kind} | {each.source}", each) for each in self.sources),
            "",
            *self._anchor_lines(),
            *self._ran_out_lines(),
            *self._launch_lines(),
            *self._unmapped_lines(),
        ]
        return "\n".join(parts).rstrip() + "\n"

    def _anchor_lines(self) -> list[str]:
        if not self.anchors:
            return []
        lines = [
            "## Beside other tools",
            "",
            "On the rows where another tool's prediction is published with the measurement:",
            "",
            "| kind | tool | rows | median | p90 | worst | bias |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(f"{each.kind} | {each.source}", each, coverage=False) for pair in self.anchors for each in pair]
        return [*lines, ""]

    def _ran_out_lines(self) -> list[str]:
        if not self.ran_out:
            return []
        wrong = [each.name for each in self.ran_out if each.said_to_fit]
        lines = ["## Runs that ran out of memory", "", f"{len(self.ran_out)}, of which {len(wrong)} were said to fit."]
        return [*lines, *([""] if wrong else []), *(f"- {name}" for name in wrong), ""]

    def _launch_lines(self) -> list[str]:
        if not self.launched:
            return []
        stated = [each for each in self.launched if each.gpu_stated]
        sound = [each for each in stated if each.fits]
        lines = [
            "## Launch configurations",
            "",
            f"{len(self.launched)} mapped, {len(stated)} name their GPU, "
            f"{len(sound)} of those said to fit. Not accepted, and why:",
            "",
        ]
        return [*lines, *(f"- `{e.name}` on {_gpu(e)}: {e.defect}" for e in self.launched if not e.fits), ""]

    def _unmapped_lines(self) -> list[str]:
        lines = [
            "## Rows left out",
            "",
            f"Mapped {self.mapped_share:.1%} of the rows that state what a job needs. Rows left out, by reason:",
            "",
        ]
        places: dict[tuple[str, str], list[str]] = {}
        for each in self.unmapped:
            places.setdefault((each.kind, each.reason), []).append(each.place)
        return [*lines, *(f"- {kind}: {reason} ({_where(at)})" for (kind, reason), at in sorted(places.items()))]


def _where(places: list[str]) -> str:
    """How many rows there are, and where the one is if it stands alone in a file."""
    return str(len(places)) if len(places) > 1 or ":" not in places[0] else f"1, {Path(places[0]).name}"


def _gpu(launched: Launched) -> str:
    return launched.gpu if launched.gpu_stated else f"{launched.gpu} (assumed)"


def _row(name: str, each: Summary, coverage: bool = True) -> str:
    cells = [str(each.n), *(f"{value:.1%}" for value in (each.median, each.p90, each.worst)), f"{each.bias:+.1%}"]
    return f"| {name} | {' | '.join([*cells, f'{each.coverage:.0%}'] if coverage else cells)} |"


def _summaries(checked: Iterable[Checked], group: Any) -> Any:
    parts: dict[tuple[str, str], list[Checked]] = {}
    for each in checked:
        parts.setdefault(group(each), []).append(each)
    return (summarize(kind, source, rows) for (kind, source), rows in sorted(parts.items()))


def summarize(kind: str, source: str, rows: Sequence[Checked]) -> Summary:
    """Errors of some rows."""
    errors = np.array([each.error for each in rows])
    size = np.abs(errors)
    return Summary(
        kind=kind,
        source=source,
        n=len(rows),
        median=float(np.median(size)) if len(rows) else math.nan,
        p90=float(np.quantile(size, 0.9)) if len(rows) else math.nan,
        worst=float(size.max()) if len(rows) else math.nan,
        bias=float(np.median(errors)) if len(rows) else math.nan,
        coverage=float(np.mean([each.held for each in rows])) if len(rows) else math.nan,
    )
