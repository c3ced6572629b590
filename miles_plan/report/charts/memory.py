"""The memory chart: one column a phase, terms stacked, the line of what may be used, the margin above it."""

from __future__ import annotations

from markupsafe import Markup

from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.plan import Plan
from miles_plan.report.charts.axis import Axis, byte_ticks
from miles_plan.report.palette import role_of_owner, shades_of_terms
from miles_plan.report.svg import NARROWEST, figure, label, line, rectangle
from miles_plan.report.units import bytes_scale, bytes_text, scaled_text
from miles_plan.report.wording import bar_bytes, memory_place

WIDTH, LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 1040, 76, 120, 22, 52, 360
WIDEST_COLUMN = 150
NARROWEST_COLUMN = 62


def memory_chart(plan: Plan, timeline: MemoryTimeline) -> Markup:
    """What one place holds, phase after phase."""
    whole = bar_bytes(timeline)
    if whole == timeline.capacity_bytes:
        whole += timeline.margin_bytes
    top = max([whole, *(phase.high_bytes for phase in timeline.phases), *(phase.total_bytes for phase in timeline.phases)])
    y = Axis(0, top * 1.02, HEIGHT - BOTTOM, TOP)
    column = min(WIDEST_COLUMN, max(NARROWEST_COLUMN, (WIDTH - LEFT - RIGHT) / max(1, len(timeline.phases))))
    right = LEFT + column * len(timeline.phases)
    parts = [*_axis(y, right), *_limits(timeline, y, right)]
    for at, phase in enumerate(timeline.phases):
        parts += _column(plan, timeline, phase, y, LEFT + at * column, column)
    title = f"Memory of {memory_place(timeline, plan.cluster)} by phase, {bytes_text(timeline.capacity_bytes)} usable"
    return figure(max(right + RIGHT, 420), HEIGHT, title, parts, narrowest=NARROWEST)


def ordered_terms(timeline: MemoryTimeline) -> list[tuple[str, str]]:
    """(owner, name) of every term, the order of stacking: owners together, in order of appearance."""
    keys = list(dict.fromkeys((term.owner, term.name) for phase in timeline.phases for term in phase.terms))
    owners = list(dict.fromkeys(owner for owner, _ in keys))
    return sorted(keys, key=lambda key: owners.index(key[0]))


def shade_class(plan: Plan, timeline: MemoryTimeline, owner: str, name: str) -> str:
    """The CSS class that colours a term."""
    return f"shade-{role_of_owner(plan.graph, owner)}-{shades_of_terms(plan, timeline.place)[(owner, name)]}"


def _axis(y: Axis, right: float) -> list[Markup]:
    scale = bytes_scale(y.high)
    parts = []
    for tick in byte_ticks(y.high):
        parts.append(line(LEFT - 4, y.at(tick), right, y.at(tick), "gridline"))
        parts.append(label(LEFT - 10, y.at(tick) + 4, scaled_text(tick, scale), "tick", "end"))
    return parts


def _limits(timeline: MemoryTimeline, y: Axis, right: float) -> list[Markup]:
    """The usable capacity, and the margin kept free above it."""
    capacity, whole = timeline.capacity_bytes, timeline.capacity_bytes + timeline.margin_bytes
    if capacity > y.high:
        return [label(right, TOP - 8, f"far below the {bytes_text(capacity)} that may be used", "tick", "end")]
    parts = []
    if timeline.margin_bytes:
        tip = f"margin kept for fragmentation and what is not modelled: {bytes_text(timeline.margin_bytes)}"
        parts.append(rectangle(LEFT, y.at(whole), right - LEFT, y.at(capacity) - y.at(whole), "margin-band", tip))
    parts.append(line(LEFT, y.at(capacity), right, y.at(capacity), "limit"))
    parts.append(label(right + 8, y.at(capacity) + 1, bytes_text(capacity), "tick limit-text"))
    parts.append(label(right + 8, y.at(capacity) + 15, "usable", "tick limit-text"))
    return parts


def _column(plan: Plan, timeline: MemoryTimeline, phase: MemoryPhase, y: Axis, x: float, column: float) -> list[Markup]:
    order = ordered_terms(timeline)
    gap = min(14.0, column * 0.12)
    parts, held = [], 0
    for term in sorted(phase.terms, key=lambda term: order.index((term.owner, term.name))):
        low, high = y.at(held), y.at(held + term.size_bytes)
        shade = shade_class(plan, timeline, term.owner, term.name)
        parts.append(rectangle(x + gap / 2, high, column - gap, low - high, f"mark stacked {shade}", _tip(phase, term)))
        if low - high >= 17 and column >= 90:
            parts.append(_inside(term, shade, x + column / 2, (low + high) / 2 + 4, column - gap))
        held += term.size_bytes
    middle = x + column / 2
    if phase.high_bytes > phase.total_bytes:
        top = y.at(phase.high_bytes)
        parts += [line(middle, y.at(held), middle, top, "whisker"), line(middle - 6, top, middle + 6, top, "whisker")]
    over = phase.total_bytes > timeline.capacity_bytes
    strong = "strong" if phase is timeline.peak else ""
    name = _wrapped(phase.name, middle, HEIGHT - BOTTOM + 16, column, f"tick dark {strong}")
    total_y = HEIGHT - BOTTOM + 18 + 14 * len(name)
    total = label(middle, total_y, bytes_text(phase.total_bytes), f"tick {strong} {'limit-text' if over else ''}", "middle")
    return [*parts, *name, total]


def _inside(term: MemoryTerm, shade: str, x: float, y: float, width: float) -> Markup:
    """The term's name inside its block, cut to fit."""
    room = int(width / 6.6)
    name = term.name.replace("_", " ")
    shown = name if len(name) <= room else f"{name[: max(1, room - 1)]}…"
    return label(x, y, shown, f"inside {shade}", "middle")


def _tip(phase: MemoryPhase, term: MemoryTerm) -> str:
    share = 100 * term.size_bytes / phase.total_bytes if phase.total_bytes else 0
    return (
        f"{phase.name}: {term.owner} {term.name} {bytes_text(term.size_bytes)}, {share:.0f}% of {bytes_text(phase.total_bytes)}"
    )


def _wrapped(words: str, x: float, y: float, width: float, class_: str) -> list[Markup]:
    """A label on at most two lines, broken at a blank or underscore."""
    room = max(6, int(width / 6.4))
    if len(words) <= room:
        return [label(x, y, words, class_, "middle")]
    breaks = [at for at, char in enumerate(words[: room + 1]) if char in " _-" and at]
    at = breaks[-1] if breaks else room
    rest = words[at:].strip()
    second = rest if len(rest) <= room else f"{rest[: room - 1]}…"
    return [label(x, y, words[:at], class_, "middle"), label(x, y + 13, second, class_, "middle")]
