"""The form for people: message, place, source line with carets, help, notes and the diff of the fix, as rustc prints them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from miles_plan.diagnostics.view import DiagnosticView, FixView, LocationView, Report

WIDEST_LINE = 120  # display columns of a source line that are shown around the place
_ANSI = {"error": "1;31", "warning": "1;33", "note": "1;36", "frame": "1;34", "bold": "1", "old": "31", "new": "32"}

Paint = Callable[[str, str], str]


def render_full(report: Report, *, color: bool = False) -> str:
    """All findings, a blank line between them, and a last line that counts them; nothing if there are none."""
    paint = _painter(color)
    blocks = [_block(view, paint) for view in report["diagnostics"]]
    if not blocks:
        return ""
    codes = sorted({view["code"] for view in report["diagnostics"]})
    more = (
        f"`miles-plan explain {codes[0]}` tells more" if len(codes) == 1 else "`miles-plan explain CODE` tells more about each"
    )
    return "\n".join([*blocks, f"{counts(report)}; {more}\n"])


def counts(report: Report) -> str:
    """`2 errors, 1 warning`."""
    summary = report["summary"]
    named = (("error", summary["errors"]), ("warning", summary["warnings"]), ("note", summary["notes"]))
    return ", ".join(f"{number} {name}{'s' if number != 1 else ''}" for name, number in named if number)


def _block(view: DiagnosticView, paint: Paint) -> str:
    severity, place = view["severity"], view["location"]
    margin = " " * len(str(place["line"])) if place and place["line"] else " "
    head = f"{severity}[{view['code']}]"
    lines = [f"{paint(severity, head)}{paint('bold', ': ' + _visible(view['message']))}"]
    if place:
        at = f":{place['line']}:{place['column']}" if place["line"] else ""
        lines.append(f"{margin}{paint('frame', '-->')} {_visible(place['file'])}{at}")
    if place and view["source_line"] is not None:
        lines += _framed(place, view["source_line"], margin, severity, paint)
    for name, texts in (("help", [view["help"]] if view["help"] else []), ("note", view["notes"])):
        lines += [f"{margin} {paint('frame', '=')} {paint('bold', name)}: {_visible(text)}" for text in texts]
    if view["fix"]:
        lines += _diff(view["fix"], margin, paint)
    return "\n".join(lines) + "\n"


def _framed(place: LocationView, source: str, margin: str, severity: str, paint: Paint) -> list[str]:
    shown, offset, width = _window(source, place)
    bar, carets = paint("frame", "|"), paint(severity, "^" * width)
    number = paint("frame", str(place["line"]))
    return [f"{margin} {bar}", f"{number} {bar} {shown}".rstrip(), f"{margin} {bar} {' ' * offset}{carets}"]


def _window(source: str, place: LocationView) -> tuple[str, int, int]:
    """The part of a line around the place that fits, and where in it the carets go: (text, offset, number of carets)."""
    start = min(place["column"] - 1, len(source))
    one_line = place["end_line"] == place["line"] and place["end_column"] > place["column"]
    end = min(place["end_column"] - 1, len(source)) if one_line else start + 1
    first = max(0, min(start, end - WIDEST_LINE // 2) - WIDEST_LINE // 3) if len(source) > WIDEST_LINE else 0
    last = min(len(source), first + WIDEST_LINE)
    start, end = max(start, first), max(min(end, last), start)
    head, tail = ("... " if first else ""), (" ..." if last < len(source) else "")
    offset = len(head) + _columns(source[first:start])
    return f"{head}{_visible(source[first:last])}{tail}", offset, max(1, _columns(source[start:end]))


def _diff(fix: FixView, margin: str, paint: Paint) -> list[str]:
    lines = [f"{margin} {paint('frame', '|')}"]
    for edit in fix["edits"]:
        number = str(edit["location"]["line"])
        if max(len(edit["old_line"]), len(edit["new_line"])) <= WIDEST_LINE:
            lines.append(f"{paint('frame', number)} {paint('old', '- ' + _visible(edit['old_line']))}")
            lines.append(f"{paint('frame', number)} {paint('new', '+ ' + _visible(edit['new_line']))}")
    return lines if len(lines) > 1 else []


def _visible(text: str) -> str:
    """Text without characters that would move the cursor: a tab is a space, other controls a replacement character."""
    return "".join(" " if each == "\t" else each if each.isprintable() else "\ufffd" for each in text)


def _columns(text: str) -> int:
    """Columns that a terminal uses for `text`: two for wide East Asian characters, none for combining ones."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _painter(color: bool) -> Paint:
    return (lambda style, text: f"\x1b[{_ANSI[style]}m{text}\x1b[0m") if color else (lambda _style, text: text)
