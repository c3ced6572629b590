"""Pages of MP9xx, our own bugs."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP901",
        title="unexpected error inside miles-plan",
        what="The program reached a state that its authors ruled out. If your input is wrong too, you should have been told.",
        why="A traceback says nothing to someone who did not write the program, so you get the place in our code instead.",
        example="error[MP901]: unexpected KeyError: 'tp' in miles_plan/passes/place_parallelism.py:88 (enumerate_layouts)",
        fix="Report it on the project's issue tracker with the spec and the output of the same command run with "
        "`MILES_PLAN_TRACEBACK=1` in the environment, which prints the full traceback.",
    ),
)
