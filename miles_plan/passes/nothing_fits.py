"""The finding that no plan fits: what is too large, which fields conflict, and the nearest change that was seen to fit."""

from __future__ import annotations

from collections.abc import Sequence

from miles_plan.diagnostics import Diagnostic
from miles_plan.passes.base import PassContext
from miles_plan.passes.conflicts import Conflict, conflict_of
from miles_plan.passes.feasibility import fits
from miles_plan.passes.joint_search import JointSearch
from miles_plan.passes.train_choices import usable_bytes

GIB = 1 << 30


def nothing_fits(ctx: PassContext, search: JointSearch, *, generates: bool) -> Diagnostic:
    """One finding for a job of which no point of the space fits."""
    conflict = conflict_of(ctx, lambda other: fits(other, generates=generates))
    reasons = tuple(f"{count} x {reason}" for reason, count in search.left_out.most_common(4))
    capacity = min(usable_bytes(group) for group in ctx.cluster.groups)
    nearest = search.nearest
    help, about = _help(conflict), _notes(conflict)
    if nearest is None:
        return ctx.error(
            "MP205",
            f"no layout of {ctx.model.name} divides {ctx.cluster.num_gpus} GPUs",
            "cluster",
            help=help or "use a number of GPUs that heads, layers and experts divide",
            notes=(*about, *reasons),
        )
    if nearest.peak_bytes > capacity:
        need, have = nearest.peak_bytes / GIB, capacity / GIB
        static = f"{nearest.static_bytes / GIB:.1f} GiB of it stay between steps: weights, gradients, optimizer"
        return ctx.error(
            "MP206",
            f"{ctx.model.name} does not fit: the smallest layout, {nearest.layout}, needs {need:.1f} GiB of a GPU's {have:.1f}",
            _place(conflict, "cluster"),
            help=help or "use GPUs with more memory: none of the fields that could change makes it fit",
            notes=(*about, static, *reasons),
        )
    return ctx.error(
        "MP207",
        "trainer and rollout engines each have layouts that fit, but no pair fits the same GPUs",
        _place(conflict, "placement"),
        help=help or "use placement: disaggregate, more GPUs, or a smaller rollout.layout",
        notes=(*about, *reasons),
    )


def way_out(ctx: PassContext, *, generates: bool) -> tuple[str, Sequence[str]]:
    """Help and notes for a job whose engines fit until they take turns; empty where the search would have found a plan."""
    if fits(ctx, generates=generates):
        return "", ()
    conflict = conflict_of(ctx, lambda other: fits(other, generates=generates))
    return _help(conflict), _notes(conflict)


def _place(conflict: Conflict, usual: str) -> str:
    """The field to point at: what the user fixed, before the size of the cluster and of the job."""
    return next((field for field in conflict.core if not field.startswith(("cluster", "rollout.response_tokens"))), usual)


def _help(conflict: Conflict) -> str:
    return f"{conflict.changes[0]} fits" if conflict.changes else ""


def _notes(conflict: Conflict) -> Sequence[str]:
    notes = []
    if conflict.core:
        notes.append(f"the smallest set of fields that conflict: {', '.join(conflict.shown)}")
    notes += [f"{change} fits too" for change in conflict.changes[1:4]]
    return notes
