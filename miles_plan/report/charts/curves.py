"""Curves over iterations: mean line, band of one standard deviation, axes with units, exact zeros said as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from markupsafe import Markup

from miles_plan.report.charts.axis import Axis, linear_ticks, log_ticks, padded_range, tick_texts
from miles_plan.report.metrics import Series
from miles_plan.report.svg import element, figure, label, line, polygon, polyline
from miles_plan.report.units import Scale, count_text, number_text, scale_for, scaled_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 504, 210, 62, 16, 14, 34
MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Point:
    """The mean of neighbouring iterations, with the lowest and highest of them."""

    iteration: float
    mean: float
    low: float
    high: float


def curve_chart(curve: Series, band: Sequence[float] | None = None, *, log: bool = False) -> Markup:
    """One metric over the iterations of its loop.

    band: half the height of a band around each value (a standard deviation), one a value. log: a logarithmic y axis, for
    values that span decades; values of exactly 0 then lie on a line of their own at the foot.
    """
    half = list(band) if band is not None and len(band) == len(curve.values) else []
    points = thinned(curve.iterations, curve.values)
    positive = [value for value in curve.values if value > 0]
    log = log and bool(positive) and min(curve.values) >= 0
    x = Axis(curve.iterations[0], max(curve.iterations[-1], curve.iterations[0] + 1), LEFT, WIDTH - RIGHT)
    y = _y_axis(curve.values, half, positive, log=log)
    parts = [*_grid(x, y, curve, log=log)]
    if half:
        parts.append(_band(x, y, thinned(curve.iterations, curve.values), thinned(curve.iterations, half)))
    elif len(points) < len(curve.values):
        parts.append(_spread(x, y, points))
    parts.append(polyline([(x.at(point.iteration), _height(y, point.mean, log=log)) for point in points], "curve"))
    if len(points) == 1:
        parts.append(element("circle", cx=x.at(points[0].iteration), cy=_height(y, points[0].mean, log=log), r=3, class_="dot"))
    parts += [line(x.at(each), TOP, x.at(each), TOP + 8, "odd-mark") for each in curve.odd if x.low <= each <= x.high]
    last = scaled_text(curve.values[-1], scale_for(curve.metric.unit, curve.values[-1]))
    title = f"{curve.metric.title} of loop {curve.loop} over {len(curve.values)} iterations, last {last}"
    chart = figure(WIDTH, HEIGHT, title, parts, class_="chart curve-chart")
    return element("div", chart, class_="curve-box", data_curve=_hover_data(x, y, curve, points, log=log))


def thinned(iterations: Sequence[int], values: Sequence[float]) -> list[Point]:
    """At most MOST_POINTS points, each the mean of its share of the iterations."""
    count = min(MOST_POINTS, len(values))
    edges = [round(at * len(values) / count) for at in range(count + 1)] if count else [0]
    return [
        Point(
            iteration=fsum(iterations[begin:end]) / (end - begin),
            mean=fsum(values[begin:end]) / (end - begin),
            low=min(values[begin:end]),
            high=max(values[begin:end]),
        )
        for begin, end in pairwise(edges)
    ]


def _y_axis(values: Sequence[float], half: Sequence[float], positive: Sequence[float], *, log: bool) -> Axis:
    if log:
        low, high = min(positive), max(positive)
        return Axis(low / 1.5, max(high * 1.5, low * 3), HEIGHT - BOTTOM - (18 if min(values) == 0 else 0), TOP, log=True)
    spread = half or [0.0] * len(values)
    low = min(value - each for value, each in zip(values, spread, strict=True))
    high = max(value + each for value, each in zip(values, spread, strict=True))
    return Axis(*padded_range(low, high), HEIGHT - BOTTOM, TOP)


def _grid(x: Axis, y: Axis, curve: Series, *, log: bool) -> list[Markup]:
    scale = scale_for(curve.metric.unit, max(abs(y.low), abs(y.high)))
    parts = []
    ticks = log_ticks(y.low, y.high) if log else linear_ticks(y.low, y.high, 4)
    for tick, words in zip(ticks, tick_texts(ticks, Scale(1.0, "") if log else scale), strict=True):
        parts.append(line(LEFT, y.at(tick), WIDTH - RIGHT, y.at(tick), "gridline"))
        parts.append(label(LEFT - 8, y.at(tick) + 4, words, "tick", "end"))
    if log and y.begin < HEIGHT - BOTTOM:
        foot = HEIGHT - BOTTOM
        parts += [line(LEFT, foot, WIDTH - RIGHT, foot, "gridline"), label(LEFT - 8, foot + 4, "exactly 0", "tick", "end")]
    for tick in linear_ticks(x.low, x.high, 6):
        if tick == int(tick):
            parts.append(label(x.at(tick), HEIGHT - BOTTOM + 16, count_text(tick), "tick", "middle"))
    parts.append(label(WIDTH - RIGHT, HEIGHT - 4, "iteration", "tick", "end"))
    return parts


def _height(y: Axis, value: float, *, log: bool) -> float:
    """The pixel of a value; exact zeros of a logarithmic axis lie at the foot."""
    return HEIGHT - BOTTOM if log and value == 0 else y.at(value)


def _band(x: Axis, y: Axis, means: Sequence[Point], halves: Sequence[Point]) -> Markup:
    upper = [(x.at(point.iteration), y.at(point.mean + half.mean)) for point, half in zip(means, halves, strict=True)]
    lower = [(x.at(point.iteration), y.at(point.mean - half.mean)) for point, half in zip(means, halves, strict=True)]
    return polygon([*upper, *reversed(lower)], "band")


def _spread(x: Axis, y: Axis, points: Sequence[Point]) -> Markup:
    upper = [(x.at(point.iteration), y.at(point.high)) for point in points]
    lower = [(x.at(point.iteration), y.at(point.low)) for point in points]
    return polygon([*upper, *reversed(lower)], "band")


def _hover_data(x: Axis, y: Axis, curve: Series, points: Sequence[Point], *, log: bool) -> str:
    """What the script needs to follow the pointer: pixels and words of every point."""
    rows = []
    for point in points:
        where = number_text(round(point.iteration, 1), 6)
        value = scaled_text(point.mean, scale_for(curve.metric.unit, point.mean))
        height = _height(y, point.mean, log=log)
        rows.append([round(x.at(point.iteration), 1), round(height, 1), f"iteration {where}: {value}"])
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
