"""No input gives anything but a job or findings with places: reading, fields, rules and names, and (less often) the passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.cli.check import findings_of
from miles_plan.diagnostics import Diagnostic, PlanError, render, report
from miles_plan.spec import load_job
from miles_plan.spec.fields import all_fields
from miles_plan.spec.named_things import named_things
from tests.spec.example import SMALL, VALID

QUICK = settings(max_examples=300, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = [
    "[",
    "]",
    "{",
    "}",
    ":",
    ", ",
    "- ",
    "? ",
    "\n",
    "  ",
    "\t",
    "&a ",
    "*a",
    "!t ",
    "|",
    ">",
    "'",
    '"',
    "#",
    "%",
    "@",
    "`",
]
WORDS = sorted(
    {step for path in all_fields() for step in path.split(".")} | {"base", "auto", "off", "null", "1e-6", "-1", "true"}
)


def without_passes(spec: str, sets: list[str]) -> tuple[list[Diagnostic], Mapping[str, str]]:
    """What `check` finds before it tries to make a plan."""
    try:
        loaded = load_job(spec, sets)
    except PlanError as problem:
        return list(problem.diagnostics), problem.sources
    return list(named_things(loaded)), loaded.sources


def holds(directory: Path, raw: bytes, sets: list[str] | None = None) -> None:
    """`check` ends in findings that have a place and can be shown in every format."""
    spec = directory / "spec.yaml"
    spec.write_bytes(raw)
    found, sources = without_passes(str(spec), sets or [])
    assert all(each.location is not None and each.location.line >= 1 for each in found if each.code != "MP101")
    view = report(found, sources)
    for format in ("full", "concise", "json", "sarif", "github"):
        render(view, format)  # type: ignore[arg-type]


@QUICK
@given(raw=st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    holds(tmp_path, raw)


@QUICK
@given(text=st.text(max_size=200))
def test_any_text(tmp_path: Path, text: str) -> None:
    holds(tmp_path, text.encode(errors="replace"))


@QUICK
@given(parts=st.lists(st.sampled_from(TOKENS + WORDS), max_size=60))
def test_any_tokens_of_yaml_and_of_specs(tmp_path: Path, parts: list[str]) -> None:
    holds(tmp_path, "".join(parts).encode())


@QUICK
@given(
    at=st.integers(0, len(VALID)), cut=st.integers(0, 12), put=st.one_of(st.sampled_from(TOKENS + WORDS), st.text(max_size=5))
)
def test_any_valid_spec_with_a_piece_replaced(tmp_path: Path, at: int, cut: int, put: str) -> None:
    holds(tmp_path, (VALID[:at] + put + VALID[at + cut :]).encode(errors="replace"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(path=st.sampled_from(sorted(all_fields())), value=values)
def test_any_value_at_any_field(tmp_path: Path, path: str, value: object) -> None:
    text = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
    holds(tmp_path, VALID.encode(), [f"{path.replace('*', '0')}={text}"])


@settings(QUICK, max_examples=60, deadline=20_000, derandomize=True)
@given(path=st.sampled_from([path for path in sorted(all_fields()) if "*" not in path]), value=values)
def test_any_value_at_any_field_through_all_passes(tmp_path: Path, path: str, value: object) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SMALL, encoding="utf-8")
    found, _ = findings_of(str(spec), [f"{path}={json.dumps(value).replace('NaN', '.nan').replace('Infinity', '.inf')}"])
    assert all(each.location is not None and each.location.line >= 1 for each in found)


@QUICK
@given(sets=st.lists(st.text(max_size=20), max_size=3))
def test_any_override(tmp_path: Path, sets: list[str]) -> None:
    holds(tmp_path, VALID.encode(), sets)


@pytest.mark.parametrize("name", ["..", "/", "", "a/b", "x" * 300, "\n", "a\0b", "\udc80", "~", "$HOME", "file:///etc/passwd"])
def test_any_path_as_a_spec(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, sources = findings_of(name, [])
    assert [each.code for each in found] == ["MP101"]
    render(report(found, sources), "full")
