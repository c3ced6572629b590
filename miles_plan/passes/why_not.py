"""Why the plan does not have what somebody asks for: impossible, too large, slower, or it does have it.

The answer is the search's: the same space narrowed to what is asked, with the same prices, next to the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from miles_plan.cost.interval import Term
from miles_plan.cost.train_memory import train_memory
from miles_plan.passes.base import PassContext
from miles_plan.passes.conflicts import conflict_of
from miles_plan.passes.feasibility import fits
from miles_plan.passes.joint_search import JointChoice, JointSearch, capacity_bytes, search_jointly
from miles_plan.passes.layout_space import has_sizes, rollout_layouts_with, train_layouts_with
from miles_plan.passes.misfits import misfits
from miles_plan.passes.placements import splits
from miles_plan.passes.questions import Questions
from miles_plan.passes.rollout_choices import engine_shortage, open_engines, rollout_room, size_engines
from miles_plan.passes.train_choices import TrainChoice, fed, memory_options, train_room
from miles_plan.passes.workload import StepWorkload, step_workload

Verdict = Literal["chosen", "slower", "faster", "too large", "impossible"]
LARGEST_TERMS = 4
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Overflow:
    """What is too large: on which side, of which layout, by how many bytes of a GPU, and its largest terms."""

    side: Literal["train", "rollout", "together"]
    layout: str
    missing_bytes: float
    terms: tuple[tuple[str, float], ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The verdict, the choice, the best plan with what is asked (where there is one), and what stands against it.

    changes: nearest changes of other fields with which what is asked would fit.
    """

    verdict: Verdict
    choice: JointChoice
    best: JointChoice | None = None
    reasons: tuple[str, ...] = ()
    overflow: Overflow | None = None
    changes: tuple[str, ...] = field(default_factory=tuple)


def why_not(base: PassContext, changed: PassContext, questions: Questions) -> Answer:
    """Answer for the job of `base`, which has a plan; `changed` is the same job with the settings that are asked about."""
    workload = step_workload(base)
    choice = search_jointly(base, workload).front[0]
    if chosen(base, choice, questions):
        return Answer(verdict="chosen", choice=choice, best=choice)
    other = step_workload(changed)
    against = [found.message for found in misfits(changed, other, generates=True)]
    if against:
        return Answer(verdict="impossible", choice=choice, reasons=tuple(against))
    sizes = questions.sizes
    if reasons := _obstacles(changed, other, questions):
        return Answer(verdict="impossible", choice=choice, reasons=reasons)

    def check(ctx: PassContext) -> bool:
        return fits(ctx, generates=True, asked=sizes)

    if check(changed):
        best = search_jointly(changed, other, train_sizes=sizes.train, rollout_sizes=sizes.rollout).front[0]
        return Answer(verdict="slower" if best.step_s >= choice.step_s else "faster", choice=choice, best=best)
    search = search_jointly(changed, other, train_sizes=sizes.train, rollout_sizes=sizes.rollout)
    settled = {name for name, _ in questions.settings}
    conflict = conflict_of(changed, check, settled=settled)
    return Answer(
        verdict="too large",
        choice=choice,
        overflow=_overflow(changed, other, search, questions),
        changes=tuple(map(str, conflict.changes)),
    )


def chosen(ctx: PassContext, choice: JointChoice, questions: Questions) -> bool:
    """Whether the choice has everything that is asked."""
    sizes = questions.sizes
    if not (has_sizes(choice.train.layout, sizes.train) and has_sizes(choice.rollout.layout, sizes.rollout)):
        return False
    settled = {
        "placement": {choice.split.kind, f"{{rollout_gpus: {choice.split.rollout_gpus}}}", "auto"},
        "train.recompute": {choice.train.recompute, "auto"},
        "train.tokens_per_gpu": {str(choice.train.tokens_per_gpu), "auto"},
        "train.optimizer.offload": {"host" if choice.train.optimizer_offload else "off", "auto"},
        "weight_sync.transport": {choice.transport, "auto"},
    }
    return all(
        value in settled[name] if name in settled else value == str(ctx.job.value_at(name))
        for name, value in questions.settings
    )


def _obstacles(ctx: PassContext, workload: StepWorkload, questions: Questions) -> tuple[str, ...]:
    """Rules that every layout with the asked sizes breaks, on any GPUs that the placement allows."""
    sizes = questions.sizes
    possible = list(splits(ctx))
    found: list[str] = []
    if sizes.train:
        rooms = [train_room(ctx, each.train.cluster, each.train_gpus, workload) for each in possible]
        tried = [train_layouts_with(ctx.model, room, sizes.train) for room in rooms]
        found += _shared([reasons for layouts, reasons in tried], any(layouts for layouts, _ in tried))
    if sizes.rollout:
        rooms = [rollout_room(ctx, each.rollout.cluster, each.rollout_gpus, workload) for each in possible]
        engines = [rollout_layouts_with(ctx.model, room, sizes.rollout) for room in rooms]
        found += _shared([reasons for layouts, reasons in engines], any(layouts for layouts, _ in engines))
    return tuple(found)


def _shared(tried: Sequence[dict[str, int]], possible: bool) -> list[str]:
    """The commonest obstacles of the first placement, which has the most GPUs; none where some layout is possible."""
    if possible or not tried:
        return []
    every = tried[0]
    most = max(every.values(), default=0)
    return [reason for reason, count in every.items() if count == most] or ["no layout has these sizes"]


def _overflow(ctx: PassContext, workload: StepWorkload, search: JointSearch, questions: Questions) -> Overflow:
    """What does not fit of the layouts that are asked about."""
    first = next(iter(splits(ctx)))
    capacity = capacity_bytes(first)
    if search.nearest is not None and search.nearest.peak_bytes > capacity:
        return Overflow(
            side="train",
            layout=str(search.nearest.layout),
            missing_bytes=search.nearest.peak_bytes - capacity,
            terms=_train_terms(ctx, workload, search.nearest),
        )
    if engines := _engine_overflow(ctx, workload, questions):
        return engines
    reason = "each side fits alone; beside each other they overflow a GPU while it trains or syncs, or a host"
    return Overflow(side="together", layout="", missing_bytes=0.0, reason=reason)


def _train_terms(ctx: PassContext, workload: StepWorkload, choice: TrainChoice) -> tuple[tuple[str, float], ...]:
    held = train_memory(
        ctx.model, choice.layout, memory_options(ctx, workload, fed(ctx, workload, choice), microbatches=choice.layout.pp)
    )
    return largest_terms((*held.terms, *held.outside_terms))


def largest_terms(terms: Sequence[Term]) -> tuple[tuple[str, float], ...]:
    """The terms that matter, largest first."""
    return tuple((term.name, term.value) for term in sorted(terms, key=lambda term: -term.value)[:LARGEST_TERMS])


def _engine_overflow(ctx: PassContext, workload: StepWorkload, questions: Questions) -> Overflow | None:
    """The engines nearest to fitting, if none of those asked about holds the job on any of the placements' GPUs."""
    nearest: Overflow | None = None
    for split in splits(ctx):
        cluster = split.rollout.cluster
        for layout in open_engines(ctx, cluster, split.rollout_gpus, workload, questions.sizes.rollout):
            refused = size_engines(ctx, cluster, layout, workload, resident_bytes=0.0)
            if not isinstance(refused, str):
                return None
            short = engine_shortage(ctx, cluster, layout, workload)
            if nearest is None or short.missing_bytes < nearest.missing_bytes:
                nearest = Overflow(
                    side="rollout",
                    layout=str(layout),
                    missing_bytes=short.missing_bytes,
                    terms=short.terms,
                    reason=refused,
                )
    return nearest
