"""The Pareto front as a scatter: step time against memory headroom, the chosen point marked."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from miles_plan.ir.plan import Candidate
from miles_plan.report.charts.axis import Axis, byte_ticks, linear_ticks, padded_range, tick_texts
from miles_plan.report.svg import NARROWEST, element, figure, label, line
from miles_plan.report.units import bytes_scale, bytes_text, number_text, scaled_text, seconds_scale, seconds_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1040, 230, 76, 40, 16, 42


def candidates_chart(candidates: Sequence[Candidate]) -> Markup:
    """A dot a candidate; what it stands for shows while the pointer rests on it."""
    steps = [each.step_s for each in candidates]
    rooms = [float(each.headroom_bytes) for each in candidates]
    x = Axis(*padded_range(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    y = Axis(0.0, max(rooms) * 1.15 or 1.0, HEIGHT - BOTTOM, TOP)
    x_scale, y_scale = seconds_scale(x.high), bytes_scale(y.high)
    parts: list[Markup] = []
    for tick in byte_ticks(y.high, 4):
        parts.append(line(LEFT, y.at(tick), WIDTH - RIGHT, y.at(tick), "gridline"))
        parts.append(label(LEFT - 8, y.at(tick) + 4, scaled_text(tick, y_scale), "tick", "end"))
    ticks = linear_ticks(x.low, x.high, 8)
    for tick, words in zip(ticks, tick_texts(ticks, x_scale), strict=True):
        parts.append(label(x.at(tick), HEIGHT - BOTTOM + 18, f"{words}{x_scale.suffix}", "tick", "middle"))
    parts.append(label(WIDTH - RIGHT, HEIGHT - 4, "step time", "tick", "end"))
    parts.append(label(LEFT + 6, TOP + 2, "headroom on the fullest GPU", "tick"))
    for each in sorted(candidates, key=lambda each: each.chosen):
        parts += _dot(each, x.at(each.step_s), y.at(each.headroom_bytes))
    return figure(WIDTH, HEIGHT, f"{len(candidates)} candidates by step time and headroom", parts, narrowest=NARROWEST)


def _dot(candidate: Candidate, x: float, y: float) -> list[Markup]:
    layouts = f"train {candidate.train_layout}; rollout {candidate.rollout_layout}; {candidate.placement}"
    price = f"{seconds_text(candidate.step_s)} a step, {number_text(candidate.gpu_hours_per_step)} GPU-hours"
    note = f"\n{candidate.note}" if candidate.note else ""
    tip = element("title", f"{layouts}\n{price}, {bytes_text(candidate.headroom_bytes)} of headroom{note}")
    dot = element("circle", tip, cx=x, cy=y, r=7 if candidate.chosen else 5, class_="dot" if candidate.chosen else "dot other")
    if not candidate.chosen:
        return [dot]
    side = "end" if x > WIDTH - 200 else "start"
    return [dot, label(x + (-11 if side == "end" else 11), y + 4, "chosen", "tick dark", side)]
