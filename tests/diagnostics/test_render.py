from __future__ import annotations

import json
import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.diagnostics import Diagnostic, Edit, Fix, Format, Location, error, render, report, warning
from miles_plan.diagnostics.render_full import WIDEST_LINE

SOURCE = "rollout:\n  temprature: 0.7\n  name: 漢字, x\n\ttab: 1\n"
SOURCES = {"spec.yaml": SOURCE, "--set": "a=1"}
KEY = Location("spec.yaml", 2, 3, 2, 13)
FINDINGS = (
    warning("MP160", "b is set, and nothing reads it", Location("--set", 1, 1, 1, 2), field="b"),
    error(
        "MP120",
        "unknown key `temprature`",
        KEY,
        field="rollout.temprature",
        help="did you mean `temperature`?",
        notes=["one", "two"],
        fix=Fix("rename", (Edit(KEY, "temperature"),)),
    ),
    error("MP101", "no file", Location("missing, or: worse.yaml")),
    error("MP901", "no place"),
)


def full(*findings: Diagnostic, sources: dict[str, str] | None = None) -> str:
    return render(report(findings, SOURCES if sources is None else sources), "full")


def test_full() -> None:
    assert full(*FINDINGS) == (
        "warning[MP160]: b is set, and nothing reads it\n"
        " --> --set:1:1\n"
        "  |\n"
        "1 | a=1\n"
        "  | ^\n"
        "\n"
        "error[MP101]: no file\n"
        " --> missing, or: worse.yaml\n"
        "\n"
        "error[MP120]: unknown key `temprature`\n"
        " --> spec.yaml:2:3\n"
        "  |\n"
        "2 |   temprature: 0.7\n"
        "  |   ^^^^^^^^^^\n"
        "  = help: did you mean `temperature`?\n"
        "  = note: one\n"
        "  = note: two\n"
        "  |\n"
        "2 -   temprature: 0.7\n"
        "2 +   temperature: 0.7\n"
        "\n"
        "error[MP901]: no place\n"
        "\n"
        "3 errors, 1 warning; `miles-plan explain CODE` tells more about each\n"
    )


def test_concise() -> None:
    assert render(report(FINDINGS, SOURCES), "concise").splitlines() == [
        "--set:1:1: warning[MP160]: b is set, and nothing reads it",
        "missing, or: worse.yaml: error[MP101]: no file",
        "spec.yaml:2:3: error[MP120]: unknown key `temprature` (help: did you mean `temperature`?)",
        "-: error[MP901]: no place",
    ]


def test_github() -> None:
    assert render(report(FINDINGS, SOURCES), "github").splitlines() == [
        "::warning file=--set,line=1,col=1,endLine=1,endColumn=2,title=MP160::b is set, and nothing reads it",
        "::error file=missing%2C or%3A worse.yaml,title=MP101::no file",
        "::error file=spec.yaml,line=2,col=3,endLine=2,endColumn=13,title=MP120::"
        "unknown key `temprature` (did you mean `temperature`?)",
        "::error title=MP901::no place",
    ]


def test_json_holds_all_that_the_text_shows() -> None:
    view = json.loads(render(report(FINDINGS, SOURCES), "json"))
    assert view["schema"] == "miles-plan/diagnostics/1"
    assert view["summary"] == {"errors": 3, "warnings": 1, "notes": 0}
    assert view["diagnostics"][2] == {
        "code": "MP120",
        "severity": "error",
        "message": "unknown key `temprature`",
        "field": "rollout.temprature",
        "location": {"file": "spec.yaml", "line": 2, "column": 3, "end_line": 2, "end_column": 13},
        "source_line": "  temprature: 0.7",
        "help": "did you mean `temperature`?",
        "notes": ["one", "two"],
        "fix": {
            "description": "rename",
            "edits": [
                {
                    "location": {"file": "spec.yaml", "line": 2, "column": 3, "end_line": 2, "end_column": 13},
                    "replacement": "temperature",
                    "old_line": "  temprature: 0.7",
                    "new_line": "  temperature: 0.7",
                }
            ],
        },
    }


def test_sarif() -> None:
    log = json.loads(render(report(FINDINGS, SOURCES), "sarif"))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["MP101", "MP120", "MP160", "MP901"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
    places = [result.get("locations", [{}])[0].get("physicalLocation") for result in run["results"]]
    assert places[1] == {"artifactLocation": {"uri": "missing%2C%20or%3A%20worse.yaml"}}
    assert places[2]["region"] == {"startLine": 2, "startColumn": 3, "endLine": 2, "endColumn": 13}
    change = run["results"][2]["fixes"][0]["artifactChanges"][0]["replacements"][0]
    assert change["insertedContent"] == {"text": "temperature"}


@pytest.mark.parametrize("format", get_args(Format))
def test_nothing_found(format: Format) -> None:
    text = render(report((), {}), format)
    assert text == "" or json.loads(text)


def test_carets_stand_under_wide_characters_and_tabs() -> None:
    text = full(error("MP120", "x", Location("spec.yaml", 3, 13, 3, 14)))
    assert text.splitlines()[3:5] == ["3 |   name: 漢字, x", "  |               ^"]
    text = full(error("MP120", "x", Location("spec.yaml", 4, 2, 4, 5)))
    assert text.splitlines()[3:5] == ["4 |  tab: 1", "  |  ^^^"]


def test_a_long_line_is_cut_around_the_place() -> None:
    line = "x" * 500 + "HERE" + "y" * 500
    text = full(error("MP120", "x", Location("f", 1, 501, 1, 505)), sources={"f": line})
    shown, carets = text.splitlines()[3:5]
    assert len(shown) < WIDEST_LINE + 20
    at = carets.index("^")
    assert shown[at : at + carets.count("^")] == "HERE"


def test_color_changes_nothing_but_color() -> None:
    view = report(FINDINGS, SOURCES)
    colored = render(view, "full", color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(view, "full")


places = st.builds(Location, st.sampled_from(["f", "--set", "gone"]), *[st.integers(0, 60)] * 4)
texts = st.text(max_size=40)


@given(message=texts, help=texts, notes=st.lists(texts, max_size=2), place=st.none() | places, source=texts, name=texts)
def test_text_of_the_user_cannot_forge_lines_or_move_the_cursor(
    message: str, help: str, notes: list[str], place: Location | None, source: str, name: str
) -> None:
    finding = error("MP120", message, place, help=help, notes=notes)
    named = error("MP120", message, Location(name, 1, 1))
    view = report([finding, named], {"f": source, name: source})
    for format in get_args(Format):
        text = render(view, format)
        if format in ("full", "concise", "github"):
            assert all(character == "\n" or character.isprintable() for character in text)
    assert len(render(view, "concise").split("\n")) == 3
    assert len(render(view, "github").split("\n")) == 3
