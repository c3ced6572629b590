from __future__ import annotations

import json

import pytest

from miles_plan.cli import app
from miles_plan.cli.internal_error import internal_error
from miles_plan.diagnostics import PlanError, error


def run(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> int:
    """The exit code of the program when a command raises."""

    def failing() -> None:
        raise raised

    monkeypatch.setattr(app, "app", failing)
    with pytest.raises(SystemExit) as left:
        app.main()
    return int(left.value.code or 0)


def test_an_unforeseen_exception_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, KeyError("tp")) == 2
    text = capsys.readouterr().err
    assert text.startswith("error[MP901]: unexpected KeyError: 'tp' in miles_plan/cli/app.py:")
    assert "report" in text
    assert "Traceback" not in text


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MILES_PLAN_TRACEBACK", "1")
    assert run(monkeypatch, RecursionError()) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_findings_of_any_command_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, PlanError((error("MP130", "none is given"),))) == 1
    assert "error[MP130]: none is given" in capsys.readouterr().err


def test_an_exception_from_outside_names_our_frame() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert internal_error(caught.value).message.startswith("unexpected JSONDecodeError: Expecting property name")
