"""Every diagnostic as the user sees it: a spec that has the mistake, and the whole text beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.cli.check import findings_of
from miles_plan.diagnostics import PAGES, render, report
from tests.conftest import Golden

ERRORS = Path(__file__).parent.parent / "golden" / "errors"
SPECS = sorted(path for path in ERRORS.glob("*.yaml") if path.name != "valid.yaml")


def sets_of(spec: Path) -> list[str]:
    """The overrides in a first line `# --set a=1`."""
    first = spec.read_bytes().split(b"\n")[0].decode(errors="replace")
    return [first.removeprefix("# --set ")] if first.startswith("# --set ") else []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_text_is_the_golden_one(spec: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ERRORS)
    found, sources = findings_of(spec.name, sets_of(spec))
    assert spec.stem.split("_")[0] in {each.code for each in found}, "the file shows another code than its name says"
    assert all(each.location is not None and each.location.line and each.location.column for each in found)
    golden.check(f"errors/{spec.stem}.txt", render(report(found, sources), "full"))


def test_valid_spec_has_no_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ERRORS)
    assert findings_of("valid.yaml", [])[0] == []


def test_every_code_of_check_has_a_golden_file() -> None:
    """Codes of the environment (MP42x and up) and of runs need more than a spec; their tests lie with the executor's."""
    found_by_check = {code for code in PAGES if code[:3] in ("MP1", "MP2", "MP3")} | {"MP401", "MP410"}
    shown = {path.stem.split("_")[0] for path in SPECS}
    assert found_by_check - shown == set(), "add tests/golden/errors/<code>.yaml and run --update-golden"


def test_no_golden_text_is_left_over() -> None:
    assert {path.stem for path in ERRORS.glob("*.txt")} == {path.stem for path in SPECS}
