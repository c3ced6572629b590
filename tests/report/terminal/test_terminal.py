from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from miles_plan.ir.plan import Plan
from miles_plan.report.compare import compare_plans
from miles_plan.report.run_files import read_run
from miles_plan.report.terminal import DEFAULT_SECTIONS, SECTIONS, render_difference, render_plan, render_run
from miles_plan.report.terminal.run_page import sparkline
from tests.conftest import Golden
from tests.report.sample_plans import NAMES, load_plan

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def text_of(plan: Plan, width: int, *, full: bool = False, sections: tuple[str, ...] | None = None) -> str:
    file = io.StringIO()
    render_plan(plan, Console(file=file, width=width), full=full, sections=sections)
    return file.getvalue()


def without_digest(shown: str) -> str:
    """A plan's digest changes with every field that the IR gains; a page does not."""
    return re.sub(r"plan [0-9a-f]{12}", "plan ############", shown)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [80, 120])
def test_the_page_of_a_plan(name: str, width: int, golden: Golden) -> None:
    golden.check(f"report/{name}_{width}.txt", without_digest(text_of(load_plan(name), width)))


def test_everything_of_a_plan(golden: Golden) -> None:
    golden.check("report/moe_1024_all.txt", without_digest(text_of(load_plan("moe_1024"), 120, full=True)))


def test_the_page_of_a_run(run_dir: Path, golden: Golden) -> None:
    file = io.StringIO()
    render_run(replace(read_run(run_dir), path=Path("runs/a")), Console(file=file, width=80))
    golden.check("report/run_80.txt", without_digest(file.getvalue()))


def test_the_difference_of_two_plans(golden: Golden) -> None:
    file = io.StringIO()
    render_difference(compare_plans(load_plan("moe_1024"), load_plan("disaggregated")), Console(file=file, width=100))
    golden.check("report/difference_100.txt", without_digest(file.getvalue()))


@pytest.mark.parametrize("width", [40, 60, 80, 97, 120, 200])
@pytest.mark.parametrize("full", [False, True])
def test_no_line_is_wider_than_the_terminal_nor_ends_in_blanks(width: int, full: bool, any_plan: Plan) -> None:
    for line in text_of(any_plan, width, full=full).splitlines():
        assert cell_len(line) <= width
        assert line == line.rstrip()


def test_a_pipe_gets_no_escape_and_no_colour_means_no_colour(moe_plan: Plan) -> None:
    assert "\x1b" not in text_of(moe_plan, 80)
    file = io.StringIO()
    render_plan(moe_plan, Console(file=file, width=80, force_terminal=True, color_system="truecolor", no_color=True))
    codes = {int(code) for found in ESCAPE.findall(file.getvalue()) for code in re.findall(r"\d+", found)}
    assert codes <= {0, 1, 2}, "bold and dim only"


def test_colour_changes_no_letter_but_the_bars(embedded_plan: Plan) -> None:
    file = io.StringIO()
    render_plan(
        embedded_plan, Console(file=file, width=100, force_terminal=True, color_system="truecolor"), sections=["decisions"]
    )
    coloured = "".join(f"{line.rstrip()}\n" for line in ESCAPE.sub("", file.getvalue()).splitlines())
    assert coloured == text_of(embedded_plan, 100, sections=("decisions",))


def test_an_ascii_terminal_gets_ascii(any_plan: Plan) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    named = replace(any_plan, name="größe")
    render_plan(named, Console(file=file, width=80, force_terminal=False), full=True)
    file.seek(0)
    shown = file.read()
    assert "gr\\xf6" in shown
    assert "###" in shown


def test_names_are_text_not_markup_and_not_escapes(embedded_plan: Plan) -> None:
    hostile = "[red]x[/red]\x1b[2J\u202e"
    decisions = (replace(embedded_plan.decisions[0], value=hostile, reason=hostile),)
    shown = text_of(replace(embedded_plan, name=hostile, decisions=decisions, unread_fields=(hostile,)), 120, full=True)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert shown.count("[red]x[/red]\\x1b[2J\\u202e") == 4


def test_a_big_plan_is_complete(moe_plan: Plan) -> None:
    shown = text_of(moe_plan, 160, full=True)
    for task in moe_plan.graph.tasks:
        assert shown.count(task.name) >= 3, f"{task.name}: under its group, in the step, in the failures"
    for decision in moe_plan.decisions:
        assert decision.reason in re.sub(r"\s+", " ", shown)
        assert all(other.value in shown for other in decision.alternatives)
    for rows, name in ((moe_plan.transfers, "pattern"), (moe_plan.numerics, "op"), (moe_plan.estimates, "name")):
        assert all(getattr(row, name) in shown for row in rows)
    assert all(candidate.train_layout in shown for candidate in moe_plan.candidates)
    assert "MP214" in shown


def test_sections_can_be_chosen(moe_plan: Plan) -> None:
    assert set(DEFAULT_SECTIONS) <= set(SECTIONS)
    only = text_of(moe_plan, 80, sections=("estimates",))
    assert only.lstrip().startswith("Estimates ")
    assert "Placement" not in only
    with pytest.raises(ValueError, match="no section 'memori', there are: summary, "):
        text_of(moe_plan, 80, sections=("memori",))


def test_a_phase_that_does_not_fit_says_so(embedded_plan: Plan) -> None:
    timeline = embedded_plan.graph.memory[0]
    small = replace(timeline, capacity_bytes=600 * 2**20)
    shown = text_of(replace(embedded_plan, graph=replace(embedded_plan.graph, memory=(small,))), 100, sections=("memory",))
    assert "-10.5 MiB" in shown
    enough = replace(timeline, capacity_bytes=620 * 2**20)
    shown = text_of(replace(embedded_plan, graph=replace(embedded_plan.graph, memory=(enough,))), 100, sections=("memory",))
    assert "'train' may need 659.3 MiB, 39.3 MiB more than there is" in shown


def test_every_letter_of_a_memory_bar_is_in_the_legend(any_plan: Plan) -> None:
    shown = text_of(any_plan, 120, sections=("memory",))
    for block in shown.split("Memory of ")[1:]:
        legend = set(re.findall(r"(?:^|  )(\w) \w", "\n".join(line for line in block.splitlines() if line.startswith("  "))))
        bars = [match for line in block.splitlines() for match in re.findall(r"[KMGT]iB  ([A-Za-z0-9]+)·* ", line)]
        assert bars
        assert {letter for bar in bars for letter in bar} <= legend


def test_a_sparkline_keeps_ends_and_extremes() -> None:
    assert sparkline((0.0, 1.0, 2.0, 7.0), 10) == "▁▂▃█"
    assert sparkline(tuple(float(at) for at in range(80)), 8) == "▁▂▃▄▅▆▇█"
