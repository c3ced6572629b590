from __future__ import annotations

import re
from pathlib import Path

import pytest

from miles_plan.diagnostics import PAGES, Diagnostic, PlanError, error, explanation, warning
from miles_plan.diagnostics.book import markdown
from miles_plan.diagnostics.codes import RANGES
from tests.conftest import Golden

ROOT = Path(__file__).parent.parent.parent


def test_the_document_is_the_pages(golden: Golden) -> None:
    golden.check("../../docs/diagnostics.md", markdown())


def test_codes_lie_in_the_ranges_and_in_their_modules() -> None:
    assert all(re.fullmatch(r"MP\d{3}", code) and code[:3] in RANGES for code in PAGES)
    for page in PAGES.values():
        assert not page.title.endswith(".")
        assert all(text.strip() for text in (page.what, page.why, page.example, page.fix))


def codes_in(folder: Path) -> set[str]:
    """Codes that the Python files of a folder report, apart from the pages themselves."""
    files = [path for path in folder.rglob("*.py") if not path.name.startswith("pages_") and path.name != "book.py"]
    return {code for path in files for code in re.findall(r'"(MP\d{3})"', path.read_text(encoding="utf-8"))}


def test_every_code_in_the_source_has_a_page() -> None:
    assert codes_in(ROOT / "miles_plan") - set(PAGES) == set()


def test_every_page_of_the_planner_is_used() -> None:
    planner = {code for code in PAGES if code[:3] in ("MP1", "MP2", "MP3", "MP9")}
    assert planner - codes_in(ROOT / "miles_plan") == set(), "pages of codes that nothing reports"


def test_a_code_without_a_page_cannot_be_reported() -> None:
    with pytest.raises(ValueError, match="MP999"):
        Diagnostic("MP999", "x")
    with pytest.raises(ValueError, match="MP000"):
        explanation("MP000")


def test_a_plan_error_sorts_its_findings_and_needs_an_error() -> None:
    with pytest.raises(ValueError, match="error"):
        PlanError((warning("MP160", "x"),))
    problem = PlanError((error("MP130", "b"), warning("MP160", "a")))
    assert [each.code for each in problem.diagnostics] == ["MP130", "MP160"]
    assert str(problem) == "-: error[MP130]: b\n-: warning[MP160]: a"
