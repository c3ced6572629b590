"""Every train layout under every option as columns: memory first, then the time of what fits.

A row is a layout with a micro-batch budget, a recomputation and a place for the optimizer state. Layouts that share their
pipeline are priced together, all budgets at once: memory is affine in the tokens of a micro-batch (the embedded engine's is
not, so it is asked for each budget), and time takes the budget as a column. The figures are those that `train_memory` and
`train_step_time` give one by one (tests/passes/test_train_prices.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.cost.columns import Floats, LayoutColumns, group_layouts, microbatches_in_flight, stage_kinds
from miles_plan.cost.communication import Links
from miles_plan.cost.state_memory import FRAGMENTATION, host_bytes, sum_terms
from miles_plan.cost.train_memory import ASLEEP, OUTSIDE, STATIC, stage_terms
from miles_plan.cost.train_options import TrainMemoryOptions
from miles_plan.cost.train_time import TrainTimeOptions, TrainWorkload, fed_tokens, train_step_columns
from miles_plan.ir.layout import Recompute, TrainLayout

RECOMPUTE_ORDER: tuple[Recompute, ...] = ("none", "selective", "full")
PROBE_TOKENS = 1024
IN_FLIGHT = frozenset({"activations", "pipeline in flight"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetColumns(TrainWorkload):
    """A workload whose `tokens_per_gpu` is a column: one budget for each layout that is priced."""

    def __post_init__(self) -> None:
        """Nothing to check: budgets come from the search, and a column has no single sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceJob:
    """What is the same for all rows. The callables give the cost models' options of one recomputation and offload.

    budgets: micro-batch budgets in tokens worth pricing at a context-parallel size, ascending.
    """

    model: ModelArchitecture
    links: Links
    workload: TrainWorkload
    capacity_bytes: int
    recomputes: tuple[Recompute, ...]
    offloads: tuple[bool, ...]
    budgets: Callable[[int], list[int]]
    memory: Callable[[int, Recompute, bool], TrainMemoryOptions]
    time: Callable[[Recompute, bool], TrainTimeOptions]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRows:
    """Rows as columns of shape [n]; `layout` and `recompute` are positions in the table's layouts and in RECOMPUTE_ORDER.

    `point` numbers a layout with its budget among those that are priced together.

    Bytes are of the fullest rank: at the peak of a step, allocated between steps, the same without gradients and
    optimizer, outside the allocator (context and communicators), with all states away, and on the host.
    """

    point: NDArray[np.intp]
    layout: NDArray[np.intp]
    recompute: NDArray[np.intp]
    tokens_per_gpu: NDArray[np.intp]
    offload: NDArray[np.bool_]
    step_s: Floats
    log_prob_s: Floats
    peak_bytes: Floats
    static_bytes: Floats
    weight_bytes: Floats
    outside_bytes: Floats
    asleep_bytes: Floats
    host_bytes: Floats

    def __len__(self) -> int:
        return len(self.layout)

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> PriceRows:
        """The rows at these positions."""
        return PriceRows(**{each.name: getattr(self, each.name)[chosen] for each in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """The rows that fit, how many do not, and the one row whose peak is least, fitting or not (its times are 0)."""

    layouts: tuple[TrainLayout, ...]
    rows: PriceRows
    overflowing: int
    smallest: PriceRows


Worth = Callable[[PriceRows], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedLayouts:
    """Every layout under every option with its bytes, and the groups that can still put times to them."""

    layouts: tuple[TrainLayout, ...]
    groups: tuple[tuple[_Group, PriceRows], ...]  # with the rows that fit
    too_large: tuple[tuple[_Group, PriceRows], ...]  # with those that do not
    smallest: PriceRows

    @property
    def overflowing(self) -> int:
        """How many rows do not fit."""
        return sum(len(rows) for _, rows in self.too_large)

    def timed(self) -> PriceTable:
        """The rows that fit with their times."""
        return self.passed().updated()

    def passed(self, worth: Worth | None = None) -> PassedLayouts:
        """The rows that fit with the time of a log-prob pass; rows that `worth` is false of, before and after, are left out."""
        return self._passed(self.groups, worth)

    def passed_too_large(self, worth: Worth) -> PassedLayouts:
        """The same of the rows that do not fit: what they would take if they did."""
        return self._passed(self.too_large, worth)

    def _passed(self, groups: Sequence[tuple[_Group, PriceRows]], worth: Worth | None) -> PassedLayouts:
        found = []
        for group, rows in groups:
            wanted = rows if worth is None else rows.take(worth(rows))
            if len(wanted):
                wanted = group.passed(wanted)
                wanted = wanted if worth is None else wanted.take(worth(wanted))
            if len(wanted):
                found.append((group, wanted))
        return PassedLayouts(sized=self, groups=tuple(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedLayouts:
    """Rows whose log-prob pass is timed, by which an update can be bounded; the update is not."""

    sized: SizedLayouts
    groups: tuple[tuple[_Group, PriceRows], ...]

    def updated(self, worth: Worth | None = None) -> PriceTable:
        """The rows with all their times; rows that `worth` is false of are left out."""
        found = [_no_rows()]
        for group, rows in self.groups:
            wanted = rows if worth is None else rows.take(worth(rows))
            if len(wanted):
                found.append(group.updated(wanted))
        sized = self.sized
        return PriceTable(layouts=sized.layouts, rows=_joined(found), overflowing=sized.overflowing, smallest=sized.smallest)


def size_layouts(layouts: Sequence[TrainLayout], job: PriceJob) -> SizedLayouts:
    """Put bytes to every layout under every option of the job."""
    groups, too_large, smallest = [], [], [_no_rows()]
    shared: dict[tuple[object, ...], dict[str, Floats]] = {}
    for positions, columns in group_layouts(layouts):
        group = _Group(positions=positions, layouts=[layouts[at] for at in positions], columns=columns, job=job, shared=shared)
        held = group.held()
        fits = held.peak_bytes <= job.capacity_bytes
        smallest.append(held.take(np.array([np.argmin(held.peak_bytes)])))
        if fits.any():
            groups.append((group, held.take(fits)))
        if not fits.all():
            too_large.append((group, held.take(~fits)))
    shared.clear()
    nearest = _joined(smallest)
    least = np.argsort(nearest.peak_bytes, kind="stable")[:1]
    return SizedLayouts(
        layouts=tuple(layouts),
        groups=tuple(groups),
        too_large=tuple(too_large),
        smallest=nearest.take(least.astype(np.intp)),
    )


def _no_rows() -> PriceRows:
    kinds = {"point": np.intp, "layout": np.intp, "recompute": np.intp, "tokens_per_gpu": np.intp, "offload": np.bool_}
    return PriceRows(**{each.name: np.zeros(0, dtype=kinds.get(each.name, np.float64)) for each in fields(PriceRows)})


def _joined(parts: Sequence[PriceRows]) -> PriceRows:
    return PriceRows(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(PriceRows)})


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Layouts that share their pipeline: `columns` of them, and their positions among all."""

    positions: NDArray[np.intp]
    layouts: list[TrainLayout]
    columns: LayoutColumns
    job: PriceJob
    shared: dict[tuple[object, ...], dict[str, Floats]]

    def held(self) -> PriceRows:
        """Bytes of every layout under every option; times are still 0."""
        at, tokens = self.points
        flight = self._in_flight(at, tokens)
        fed = fed_tokens(self.job.workload, tokens, self.columns.dp[at], self.columns.cp[at])
        first = self._terms(PROBE_TOKENS, self.job.recomputes[0], self.job.offloads[0])
        outside = sum_terms({name: first[name] for name in OUTSIDE - {"fragmentation"} if name in first}) + self._nothing()
        asleep = sum_terms({name: first[name] for name in ASLEEP if name in first}) + self._nothing()
        fragmented = 1.0 + (FRAGMENTATION if "fragmentation" in first else 0.0)
        states = [self._states(offload, first) for offload in self.job.offloads]
        parts = []
        for recompute, allocated in self._allocated(at, fed, flight, first):
            for offload, (change, static, weights, host) in zip(self.job.offloads, states, strict=True):
                total = allocated + change[at]
                stage = np.argmax(total, axis=1)
                parts.append(
                    PriceRows(
                        point=np.arange(len(at)),
                        layout=at,
                        recompute=np.full(len(at), RECOMPUTE_ORDER.index(recompute), dtype=np.intp),
                        tokens_per_gpu=tokens,
                        offload=np.full(len(at), offload),
                        step_s=np.zeros(len(at)),
                        log_prob_s=np.zeros(len(at)),
                        peak_bytes=total[np.arange(len(at)), stage] * fragmented + outside[at, stage],
                        static_bytes=static[at, stage],
                        weight_bytes=weights[at, stage],
                        outside_bytes=outside[at, stage],
                        asleep_bytes=asleep[at, stage],
                        host_bytes=host[at, stage],
                    )
                )
        rows = _joined(parts)
        return replace(rows, layout=self.positions[rows.layout])

    @cached_property
    def points(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Every layout of the group with each of its budgets: positions in the group, tokens."""
        sizes = self.columns.cp.astype(np.intp)
        budgets = {int(cp): self.job.budgets(int(cp)) for cp in np.unique(sizes)}
        at = np.repeat(np.arange(len(sizes)), [len(budgets[int(cp)]) for cp in sizes])
        return at, np.concatenate([np.array(budgets[int(cp)], dtype=np.intp) for cp in sizes])

    def _in_flight(self, at: NDArray[np.intp], tokens: NDArray[np.intp]) -> Floats:
        """Micro-batches whose activations each stage holds at its peak, shape [points, pp]."""
        work, columns = self.job.workload, self.columns
        room = np.maximum(tokens * columns.cp[at], work.longest)
        count = np.maximum(1.0, np.ceil(work.total_tokens / columns.dp[at] / work.gradient_steps / room))
        several = np.minimum(count, 3.0 * columns.pp).astype(np.intp)  # more are never in flight
        each, inverse = np.unique(several, return_inverse=True)
        held = [microbatches_in_flight(columns.pp, columns.vpp, int(number)) for number in each]
        return np.asarray(np.stack(held)[inverse])

    def _states(self, offload: bool, first: dict[str, Floats]) -> tuple[Floats, Floats, Floats, Floats]:
        """Bytes more than in `first`, the first choice's terms; bytes that stay between steps; the same without gradients
        and optimizer; host bytes; shape [n, pp].

        Offloading moves states alone, so no budget and no recomputation changes these.
        """
        recompute, usual = self.job.recomputes[0], self.job.offloads[0]
        terms = first if offload == usual else self._terms(PROBE_TOKENS, recompute, offload)
        static = sum_terms({name: terms[name] for name in STATIC if name in terms}) + self._nothing()
        weights = static - terms["gradients"] - terms["optimizer"]
        host = host_bytes(self.job.model, self.columns, self.job.memory(1, recompute, offload))
        return _resident(terms) - _resident(first), static, weights, host

    def _allocated(
        self, at: NDArray[np.intp], tokens: NDArray[np.intp], flight: Floats, first: dict[str, Floats]
    ) -> Iterator[tuple[Recompute, Floats]]:
        """Bytes inside the allocator under each recomputation, [points, pp]; `first`: the first one's terms at PROBE_TOKENS."""
        usual, offload = self.job.recomputes[0], self.job.offloads[0]
        if self.job.memory(1, usual, offload).engine == "torch":
            for recompute in self.job.recomputes:
                yield recompute, self._allocated_each(at, tokens, flight, recompute)
            return
        base = 2.0 * _resident(first) - _resident(self._terms(2 * PROBE_TOKENS, usual, offload))  # what is there at no tokens
        for recompute in self.job.recomputes:
            terms = first if recompute == usual else self._terms(PROBE_TOKENS, recompute, offload)
            slope, each = (_resident(terms) - base) / PROBE_TOKENS, terms["activations"] / PROBE_TOKENS
            yield recompute, np.asarray(base[at] + tokens[:, None] * (slope[at] + each[at] * flight))

    def _allocated_each(self, at: NDArray[np.intp], tokens: NDArray[np.intp], flight: Floats, recompute: Recompute) -> Floats:
        """The same, asked for each budget apart: the embedded engine's attention scores grow with its square."""
        allocated = np.empty((len(at), self.columns.pp))
        for budget in np.unique(tokens):
            rows = tokens == budget
            terms = self._terms(int(budget), recompute, self.job.offloads[0])
            allocated[rows] = _resident(terms)[at[rows]] + terms["activations"][at[rows]] * flight[rows]
        return allocated

    def _nothing(self) -> Floats:
        return np.zeros((len(self.columns), self.columns.pp))

    def _terms(self, tokens: int, recompute: Recompute, offload: bool) -> dict[str, Floats]:
        """Terms of the group's layouts, shape [n, pp]; what is in flight aside, interleaving does not change them."""
        key = (*self._stages, tokens, recompute, offload)
        if key not in self.shared:
            options = self.job.memory(tokens, recompute, offload)
            self.shared[key] = stage_terms(self.job.model, self.columns, options, self.job.links.profile)
        return self.shared[key]

    @property
    def _stages(self) -> tuple[object, ...]:
        """What each rank holds of the model, and the sizes that cut it: equal for groups that differ in interleaving alone."""
        columns = self.columns
        sizes = np.stack([columns.tp, columns.cp, columns.dp, columns.ep, columns.etp, columns.sequence_parallel])
        return columns.pp, stage_kinds(self.job.model, columns).tobytes(), sizes.tobytes()

    def passed(self, rows: PriceRows) -> PriceRows:
        """The rows with the seconds of a log-prob pass, which recomputation and offloading leave alone."""
        at, tokens, point = self._distinct(rows)
        options = self.job.time(self.job.recomputes[0], False)
        log_prob = sum_terms(self._seconds(at, tokens, options, forward_only=True))[point]
        return replace(rows, log_prob_s=log_prob)

    def updated(self, rows: PriceRows) -> PriceRows:
        """The rows with the seconds of the update; offloading changes the optimizer's term alone."""
        step = np.zeros(len(rows))
        for number in np.unique(rows.recompute):
            of_it = rows.recompute == number
            at, tokens, where = self._distinct(rows.take(of_it))
            terms = self._seconds(at, tokens, self.job.time(RECOMPUTE_ORDER[number], False))
            step[of_it] = sum_terms(terms)[where] - np.where(rows.offload[of_it], terms["optimizer"][where], 0.0)
        if rows.offload.any():
            step[rows.offload] += self._offloaded_s(self.points[0][rows.point[rows.offload]])
        return replace(rows, step_s=step)

    def _distinct(self, rows: PriceRows) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """The rows' distinct points: positions of their layouts in the group, tokens, and which of them each row is."""
        at, tokens = self.points
        used = np.zeros(len(at), dtype=bool)
        used[rows.point] = True
        number = np.cumsum(used) - 1
        return at[used], tokens[used], number[rows.point]

    def _seconds(
        self, at: NDArray[np.intp], tokens: NDArray[np.intp], options: TrainTimeOptions, *, forward_only: bool = False
    ) -> dict[str, Floats]:
        work = self.job.workload
        batch = BudgetColumns(
            total_tokens=work.total_tokens,
            sum_squares=work.sum_squares,
            longest=work.longest,
            tokens_per_gpu=tokens.astype(np.float64),  # type: ignore[arg-type]  # a column, which the formulas broadcast
            gradient_steps=work.gradient_steps,
        )
        layouts = [self.layouts[index] for index in at]
        return train_step_columns(self.job.model, layouts, batch, self.job.links, options, forward_only)

    def _offloaded_s(self, inside: NDArray[np.intp]) -> Floats:
        """Seconds of the optimizer on the host for these layouts: no budget and no recomputation changes them."""
        used, where = np.unique(inside, return_inverse=True)
        layouts = [self.layouts[at] for at in used]
        options = self.job.time(self.job.recomputes[0], True)
        terms = train_step_columns(self.job.model, layouts, self.job.workload, self.job.links, options)
        return np.asarray(terms["optimizer"][where])


def _resident(terms: dict[str, Floats]) -> Floats:
    """All that the allocator holds but the activations, of which there is one set for each micro-batch in flight."""
    return sum_terms(terms, exclude=OUTSIDE | IN_FLIGHT)


def front_rows(
    first: Floats, second: NDArray[np.number], tie: Floats | None = None, within: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """Positions of the rows that no other of the same class beats: at most it in both costs and less in one.

    All of shape [n]; `within` numbers the classes. Of rows equal in both costs the one with the least `tie` stays.
    Sorted by the first cost within each class.
    """
    if not len(first):
        return np.zeros(0, dtype=np.intp)
    group = np.zeros(len(first), dtype=np.intp) if within is None else within
    order = np.lexsort((np.zeros(len(first)) if tie is None else tie, second, first, group))
    ranked, sorted_group = np.asarray(second[order], dtype=np.float64), group[order]
    # A running minimum within each class: classes are shifted apart so that one pass over all of them will do.
    apart = (ranked.max() - ranked.min() + 1.0) * 2.0
    shifted = ranked - apart * np.searchsorted(np.unique(sorted_group), sorted_group)
    before = np.concatenate([[np.inf], np.minimum.accumulate(shifted)[:-1]])
    return np.asarray(order[shifted < before])


def each_row(table: PriceTable) -> Iterator[int]:
    """Positions of the table's rows, fastest update and pass first."""
    rows = table.rows
    yield from np.lexsort((rows.peak_bytes, rows.offload, rows.step_s + rows.log_prob_s)).tolist()
