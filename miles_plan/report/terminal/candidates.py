"""The Pareto front of the placement search: what else was worth considering."""

from __future__ import annotations

from rich.text import Text

from miles_plan.ir.plan import Candidate, Plan
from miles_plan.report.terminal.page import Page, grid, text
from miles_plan.report.units import bytes_text, change_text, number_text, plural, seconds_text

FIRST_FEW = 6


def draw_candidates(page: Page, plan: Plan) -> None:
    """By step time, the chosen one marked with what binds it; the first few, with `full` all and their options."""
    if not plan.candidates:
        return
    ranked = sorted(plan.candidates, key=lambda each: each.step_s)
    shown = ranked if page.full else [each for at, each in enumerate(ranked) if at < FIRST_FEW or each.chosen]
    page.heading("Candidates", f"{plural(len(ranked), 'point')} of the Pareto front; a step without checkpoints and waits")
    table = grid(
        "  step", "", "GPU-hours", "headroom", "train", "rollout", "placement", "why", right=("GPU-hours", "headroom"), indent=0
    )
    best = next((each for each in ranked if each.chosen), ranked[0])
    for candidate in shown:
        table.add_row(*_cells(candidate, best, candidate.note if page.full else _difference(candidate, best)))
    page.show(table)
    if best.binding:
        page.note("binding: ", text(best.binding))
    if len(shown) < len(ranked):
        page.note(text(f"{plural(len(ranked) - len(shown), 'more point')} with --all", "dim"))


def _difference(candidate: Candidate, best: Candidate) -> str:
    """The options in which a candidate with the choice's layouts differs from it."""
    same = all(getattr(candidate, name) == getattr(best, name) for name in ("train_layout", "rollout_layout", "placement"))
    usual = best.note.split(", ")
    return ", ".join(part for part in candidate.note.split(", ") if part not in usual) if same else ""


def _cells(candidate: Candidate, best: Candidate, options: str) -> list[Text]:
    style = "bold" if candidate.chosen else ""
    note = f" ({options})" if options else ""
    return [
        Text.assemble(("▸ " if candidate.chosen else "  ", "bold"), text(seconds_text(candidate.step_s), style)),
        text(change_text(best.step_s, candidate.step_s), "dim"),
        text(number_text(candidate.gpu_hours_per_step)),
        text(bytes_text(candidate.headroom_bytes)),
        text(candidate.train_layout, style),
        text(candidate.rollout_layout, style),
        Text.assemble(text(candidate.placement, style), text(note, "dim")),
        text(candidate.why),
    ]
