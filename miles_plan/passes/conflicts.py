"""Why a job does not fit, in fields of its spec: the smallest set that conflicts, and the nearest changes that fit.

The set is found by deletion: each field in turn is set free, and stays free where the job still does not fit without it. What
is left is minimal: set any one of it free and the job fits (Chinneck, Feasibility and Infeasibility in Optimization, 2008).
Every set and every change that is suggested is put to the search's own question (`feasibility.fits`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from miles_plan.catalog.gpus import Cluster
from miles_plan.passes.base import PassContext
from miles_plan.passes.staleness import staleness_of
from miles_plan.spec.job import JobSpec
from miles_plan.spec.section import Section

_S = TypeVar("_S", bound=Section)
SHORT_RESPONSE_TOKENS = 512  # what a context length is relaxed to
LARGE_BATCH_PROMPTS = 1024  # and a batch
MANY_NODES, MANY_TIMES = 16, 8  # and a cluster: the larger of so many nodes and so many times its own
LARGEST_CLUSTER_NODES = 256
MAX_CHANGES = 4
MAX_PAIRS_TRIED = 40


@dataclass(frozen=True, slots=True)
class Change:
    """One field set to another value. before and after are as the spec would write them."""

    field: str
    before: str
    after: str
    apply: Callable[[PassContext], PassContext]

    def __str__(self) -> str:
        """As people say it."""
        return f"{self.field}: {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes made together."""

    parts: tuple[Change, ...]

    def apply(self, ctx: PassContext) -> PassContext:
        """The job with all of them."""
        for part in self.parts:
            ctx = part.apply(ctx)
        return ctx

    def __str__(self) -> str:
        """As people say it."""
        return " with ".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class Conflict:
    """core: fields that conflict, none of which could be left out, as `shown` with their values; changes: each one fits."""

    core: tuple[str, ...]
    shown: tuple[str, ...]
    changes: tuple[Changes, ...]


Check = Callable[[PassContext], bool]


def conflict_of(ctx: PassContext, check: Check, *, settled: Collection[str] = ()) -> Conflict:
    """Why the job of `ctx`, of which `check` is false, does not fit; `settled` fields are not to be changed.

    Without a core where even setting everything else free does not help.
    """
    every = tuple(each for each in relaxations(ctx) if each.field not in settled)
    core = minimal_core(ctx, every, check)
    changes = tuple(nearest_changes(ctx, core, every, check))
    return Conflict(
        core=tuple(each.field for each in core),
        shown=tuple(f"{each.field}: {each.before}" for each in core),
        changes=changes,
    )


def minimal_core(ctx: PassContext, every: Sequence[Change], check: Check) -> tuple[Change, ...]:
    """Of `every` field set free, those that it takes to fit: fixed as they are, the others free, the job does not fit."""

    def fits_with(free: Sequence[Change]) -> bool:
        return check(Changes(tuple(free)).apply(ctx))

    if not fits_with(every):
        return ()
    kept = list(every)
    for each in every:
        fixed = [other for other in kept if other is not each]
        if not fits_with([other for other in every if other not in fixed]):
            kept = fixed
    return tuple(kept)


def nearest_changes(ctx: PassContext, core: Sequence[Change], every: Sequence[Change], check: Check) -> Iterator[Changes]:
    """Single changes that make the job fit: settings, then numbers, then machines and lengths. A pair if there is none."""
    fields = [each.field for each in core]
    found = 0
    for field in sorted(fields, key=ORDER.index):
        for change in _values(ctx, field):
            if check(change.apply(ctx)):
                yield Changes((change,))
                found += 1
                break
        if found == MAX_CHANGES:
            return
    if not found:
        yield from _first_pair(ctx, sorted(fields, key=ORDER.index), every, check)


def _first_pair(ctx: PassContext, fields: Sequence[str], every: Sequence[Change], check: Check) -> Iterator[Changes]:
    """Where several sets conflict at once: a field of the one found, by its nearest values, with any other field."""
    others = sorted({each.field for each in every}, key=ORDER.index)
    pairs = [(one, other) for one in fields for other in others if one != other]
    for one, other in pairs[:MAX_PAIRS_TRIED]:
        for pair in product(_some(_values(ctx, one)), _some(_values(ctx, other))):
            if check(Changes(pair).apply(ctx)):
                yield Changes(pair)
                return


def _some(values: Iterator[Change]) -> list[Change]:
    """The nearest value, one in the middle, the furthest: pairs of all values would take too long."""
    every = list(values)
    return [every[at] for at in sorted({0, len(every) // 2, len(every) - 1})] if every else []


def setting(ctx: PassContext, field: str, value: object) -> Change:
    """The change of one field of the spec."""
    return Change(
        field=field,
        before=_shown(ctx.job.value_at(field)),
        after=_shown(value),
        apply=lambda other: replace(other, job=with_value(other.job, field.split("."), value)),
    )


def with_value(section: _S, path: Sequence[str], value: object) -> _S:
    """The section with one value replaced, deep inside."""
    if len(path) > 1:
        value = with_value(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: value})


def _shown(value: object) -> str:
    if isinstance(value, Section):
        return "{" + ", ".join(f"{name}: {part}" for name, part in value.model_dump(exclude_unset=True).items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# What a user may have fixed, in the order in which it is worth giving up; numbers and machines come last.
SETTINGS: tuple[tuple[str, str], ...] = (
    ("weight_sync.transport", "auto"),
    ("weight_sync.bucket_mib", "auto"),
    ("train.recompute", "auto"),
    ("train.optimizer.offload", "auto"),
    ("train.tokens_per_gpu", "auto"),
    ("rollout.memory_fraction", "auto"),
    ("rollout.max_running", "auto"),
    ("train.layout", "auto"),
    ("rollout.layout", "auto"),
    ("placement", "auto"),
)
ORDER = (
    *(field for field, _ in SETTINGS),
    "schedule.mode",
    "precision.train",
    "precision.rollout",
    "rollout.prompts_per_step",
    "cluster.gpus_per_node",
    "cluster.nodes",
    "rollout.response_tokens.max",
)


def relaxations(ctx: PassContext) -> Iterator[Change]:
    """Each field that the spec fixes or that sizes the job, set free; those that are rarely to blame first."""
    job = ctx.job
    if job.rollout.prompts_per_step < LARGE_BATCH_PROMPTS:
        yield setting(ctx, "rollout.prompts_per_step", LARGE_BATCH_PROMPTS)
    for field, free in SETTINGS:
        if job.value_at(field) != free:
            yield setting(ctx, field, free)
    if staleness_of(ctx)[1]:
        yield setting(ctx, "schedule.mode", "synchronous")
    yield from _formats(ctx)
    if job.rollout.response_tokens.max > SHORT_RESPONSE_TOKENS:
        yield _shorter(ctx, SHORT_RESPONSE_TOKENS)
    yield from _whole_node(ctx)
    yield _more_nodes(ctx, max(MANY_NODES, MANY_TIMES * ctx.cluster.groups[0].nodes))


def _values(ctx: PassContext, field: str) -> Iterator[Change]:
    """Values to try for a field, nearest first."""
    rollout = ctx.job.rollout
    if field == "rollout.response_tokens.max":
        limit = rollout.response_tokens.max
        for share in (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625):
            if int(limit * share) >= SHORT_RESPONSE_TOKENS:
                yield _shorter(ctx, int(limit * share) // 256 * 256)
    elif field == "cluster.nodes":
        nodes = ctx.cluster.groups[0].nodes
        for more in (1, 2, 3, 4, 5, 6, 7, *(nodes * times for times in (1, 2, 3, 5, 7, 11, 15, 31))):
            if nodes + more <= LARGEST_CLUSTER_NODES:
                yield _more_nodes(ctx, nodes + more)
    elif field == "rollout.prompts_per_step":
        for times in (2, 4, 8, 16, 64):
            yield setting(ctx, field, rollout.prompts_per_step * times)
    else:
        if field == "placement":  # nearer than leaving it open: saying which
            yield from (setting(ctx, field, word) for word in ("disaggregate", "colocate") if ctx.job.placement != word)
        yield from (each for each in relaxations(ctx) if each.field == field)


def _formats(ctx: PassContext) -> Iterator[Change]:
    """Smaller number formats that the GPUs have."""
    has_fp8 = all("fp8" in group.gpu.flops for group in ctx.cluster.groups)
    if ctx.job.precision.train == "fp32" and ctx.job.train.engine != "torch":
        yield setting(ctx, "precision.train", "bf16")
    if ctx.job.precision.rollout in ("bf16", "fp32") and has_fp8 and ctx.job.rollout.engine == "sglang":
        yield setting(ctx, "precision.rollout", "fp8_blockwise")


def _shorter(ctx: PassContext, limit: int) -> Change:
    """Responses of at most `limit` tokens, their mean and 99th percentile cut to it."""

    def apply(other: PassContext) -> PassContext:
        tokens = other.job.rollout.response_tokens
        cut = {
            name: value if value == "auto" else min(float(value), float(limit))
            for name, value in (("mean", tokens.mean), ("p99", tokens.p99))
        }
        shorter = tokens.model_copy(update={"max": limit, **cut})
        return replace(other, job=with_value(other.job, ["rollout", "response_tokens"], shorter))

    return Change("rollout.response_tokens.max", str(ctx.job.rollout.response_tokens.max), str(limit), apply)


def _more_nodes(ctx: PassContext, nodes: int) -> Change:
    """More nodes of the first kind."""

    def apply(other: PassContext) -> PassContext:
        first, *rest = other.cluster.groups
        job = other.job if other.job.cluster.groups else _with_cluster(other.job, "nodes", nodes)
        return replace(other, job=job, cluster=Cluster((replace(first, nodes=nodes), *rest)))

    return Change("cluster.nodes", str(ctx.cluster.groups[0].nodes), str(nodes), apply)


def _whole_node(ctx: PassContext) -> Iterator[Change]:
    """As many GPUs as nodes of this kind have, where the spec says fewer."""
    group = ctx.cluster.groups[0]
    whole = group.gpu.gpus_per_node
    if group.gpus_per_node >= whole or len(ctx.cluster.groups) > 1:
        return

    def apply(other: PassContext) -> PassContext:
        first = replace(other.cluster.groups[0], gpus_per_node=whole)
        return replace(other, job=_with_cluster(other.job, "gpus_per_node", whole), cluster=Cluster((first,)))

    yield Change("cluster.gpus_per_node", str(group.gpus_per_node), str(whole), apply)


def _with_cluster(job: JobSpec, field: str, value: int) -> JobSpec:
    return with_value(job, ["cluster", field], value)
