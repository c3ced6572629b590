"""SVG as escaped markup: names from a plan can never become elements or attributes."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from miles_plan.report.printable import printable, printable_lines

NARROWEST = 760  # pixels: below it a chart of 1,040 would have text too small to read, so it scrolls instead

Attribute = str | int | float | None


def element(tag: str, *children: object, **attributes: Attribute) -> Markup:
    """`<tag ...>children</tag>`; children and values are escaped unless they are Markup.

    `class_` is class, other underscores are dashes; numbers are rounded to a tenth of a pixel; None leaves an attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(child if isinstance(child, Markup) else escape(printable_lines(child)) for child in children)
    return Markup(f"<{tag}{written}/>") if not inside else Markup(f"<{tag}{written}>{inside}</{tag}>")


def _value(value: Attribute) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else printable(value)


def figure(
    width: float, height: float, title: str, parts: Sequence[Markup], *, class_: str = "chart", narrowest: float = 0
) -> Markup:
    """An image of fixed proportions with a title that screen readers speak; it shrinks with the page down to `narrowest`."""
    return element(
        "svg",
        *parts,
        class_=class_,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=int(width),
        height=int(height),
        role="img",
        aria_label=title,
        style=f"min-width:{min(width, narrowest):.0f}px" if narrowest else None,
    )


def label(x: float, y: float, words: object, class_: str = "label", anchor: str = "start") -> Markup:
    """Text with its baseline's end at (x, y)."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor)


def named(x: float, y: float, name: str, more: str, class_: str) -> Markup:
    """A name with something less important after it, wherever the name ends."""
    tail = element("tspan", more, dx=7, class_="quiet small") if more else Markup("")
    return element("text", name, tail, x=x, y=y, class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, tip: str = "", round_: float = 0) -> Markup:
    """A filled rectangle; `tip` is what shows while the pointer rests on it."""
    return element(
        "rect",
        *([element("title", tip)] if tip else []),
        x=x,
        y=y,
        width=max(0.0, width),
        height=height,
        rx=round_ or None,
        class_=class_,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points; fewer than two give nothing."""
    if len(points) < 2:
        return Markup("")
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def polygon(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A filled area."""
    return element("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def text_width(words: str, size: float = 12) -> float:
    """About how wide text is in a proportional font: 0.56 of the size a character, which errs on the wide side."""
    return len(words) * size * 0.56
