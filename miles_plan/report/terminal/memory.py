"""Memory: what each GPU and each host holds in each phase, as stacked bars with headroom and the dominating term."""

from __future__ import annotations

from rich.text import Text

from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.plan import Plan
from miles_plan.report.palette import TERMINAL_MINOR, TERMINAL_SHADES, role_of_owner, shades_of_terms
from miles_plan.report.terminal.page import Page, bar, flow, grid, text, widest
from miles_plan.report.units import bytes_text
from miles_plan.report.wording import bar_bytes, memory_place

SHORTEST_BAR = 12
Paint = dict[tuple[str, str], tuple[str, str]]  # (owner, name) of a term -> (character, style)


def draw_memory(page: Page, plan: Plan) -> None:
    """One table a timeline, then what its colours or letters mean."""
    for timeline in plan.graph.memory:
        whole = bytes_text(timeline.capacity_bytes + timeline.margin_bytes)
        margin = f"{bytes_text(timeline.capacity_bytes)} usable of {whole}"
        page.heading(f"Memory of {memory_place(timeline, plan.cluster)}", margin)
        paint = _paint(page, plan, timeline)
        _draw_phases(page, timeline, paint)
        _draw_legend(page, timeline, paint)
        _draw_upper_ends(page, timeline)


def _paint(page: Page, plan: Plan, timeline: MemoryTimeline) -> Paint:
    """A full block in the term's colour; without colour a letter of its name, each used once."""
    shades, paint = shades_of_terms(plan, timeline.place), {}
    taken: set[str] = set()
    for term in _terms(timeline):
        key = (term.owner, term.name)
        style = (*TERMINAL_SHADES[role_of_owner(plan.graph, term.owner)], TERMINAL_MINOR)[shades[key]]
        letters = [*term.name.lower(), *term.name.upper(), *"abcdefghijklmnopqrstuvwxyz0123456789"]
        letter = next((each for each in letters if each.isalnum() and each not in taken), "?")
        taken.add(letter)
        paint[key] = ("█", style) if page.coloured else (letter, "")
    return paint


def _terms(timeline: MemoryTimeline) -> list[MemoryTerm]:
    """Every term once, owners together, in order of appearance."""
    found = {(term.owner, term.name): term for phase in timeline.phases for term in phase.terms}
    owners = list(dict.fromkeys(owner for owner, _ in found))
    return sorted(found.values(), key=lambda term: owners.index(term.owner))


def _draw_phases(page: Page, timeline: MemoryTimeline, paint: Paint) -> None:
    phases = timeline.phases
    holds = [bytes_text(phase.total_bytes) for phase in phases]
    free = [_free(timeline, phase) for phase in phases]
    most = [_largest(phase) for phase in phases]
    fixed = widest((phase.name for phase in phases), "phase") + widest(holds, "holds") + widest(free, "free")
    cells = min(60, page.width - fixed - widest(most, "largest") - 4 * 2)
    show_bar = cells >= SHORTEST_BAR
    whole = bar_bytes(timeline)
    bar_title = [f"0{bytes_text(whole):>{cells - 1}}"] if show_bar else []
    table = grid("phase", "holds", "free", *bar_title, "largest", right=("holds", "free"), indent=0)
    for phase, held, left, largest in zip(phases, holds, free, most, strict=True):
        peak = phase is timeline.peak
        over = phase.total_bytes > timeline.capacity_bytes
        row = [
            text(phase.name, "bold" if peak else ""),
            text(held, "bold" if peak else ""),
            text(left, "bold red" if over else ""),
        ]
        table.add_row(*row, *([_bar(phase, paint, cells, whole)] if show_bar else []), text(largest, "dim"))
    page.show(table)


def _free(timeline: MemoryTimeline, phase: MemoryPhase) -> str:
    left = timeline.capacity_bytes - phase.total_bytes
    return bytes_text(left) if left >= 0 else f"-{bytes_text(-left)}"


def _largest(phase: MemoryPhase) -> str:
    if not phase.terms:
        return ""
    term = max(phase.terms, key=lambda term: term.size_bytes)
    return f"{term.name} {bytes_text(term.size_bytes)}"


def _bar(phase: MemoryPhase, paint: Paint, cells: int, whole: int) -> Text:
    """Terms from the left, dots up to the upper end of the estimate."""
    spans = [(0.0, phase.high_bytes / whole, "·", "dim")]
    at = 0
    for term in sorted(phase.terms, key=lambda term: list(paint).index((term.owner, term.name))):
        spans.append((at / whole, (at + term.size_bytes) / whole, *paint[(term.owner, term.name)]))
        at += term.size_bytes
    return bar(cells, spans)


def _draw_legend(page: Page, timeline: MemoryTimeline, paint: Paint) -> None:
    for owner in dict.fromkeys(owner for owner, _ in paint):
        items = [text(f"{owner}:", "dim")]
        for (of, name), (character, style) in paint.items():
            if of == owner:
                mark = Text("■ " if page.coloured else f"{character} ", style=style or "bold")
                items.append(Text.assemble(mark, text(name, "dim")))
        page.note(flow(items, page.width - 4))


def _draw_upper_ends(page: Page, timeline: MemoryTimeline) -> None:
    for phase in timeline.phases:
        if phase.total_bytes <= timeline.capacity_bytes < phase.high_bytes:
            over = bytes_text(phase.high_bytes - timeline.capacity_bytes)
            page.note(text(f"'{phase.name}' may need {bytes_text(phase.high_bytes)}, {over} more than there is", "yellow"))
