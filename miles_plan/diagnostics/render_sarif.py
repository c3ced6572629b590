"""SARIF 2.1.0, which code scanning services and editors read: https://docs.oasis-open.org/sarif/sarif/v2.1.0/."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from miles_plan import __version__
from miles_plan.diagnostics.codes import explanation
from miles_plan.diagnostics.view import DiagnosticView, FixView, LocationView, Report

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"


def render_sarif(report: Report) -> str:
    """One run with the findings as results and their codes' pages as rules."""
    codes = sorted({view["code"] for view in report["diagnostics"]})
    driver = {"name": "miles-plan", "version": __version__, "rules": [_rule(code) for code in codes]}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(view, codes.index(view["code"])) for view in report["diagnostics"]],
    }
    return json.dumps({"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False) + "\n"


def _rule(code: str) -> dict[str, Any]:
    page = explanation(code)
    return {
        "id": code,
        "shortDescription": {"text": page.title},
        "fullDescription": {"text": page.what},
        "help": {"text": page.text(), "markdown": page.markdown()},
    }


def _result(view: DiagnosticView, rule: int) -> dict[str, Any]:
    text = ". ".join(part for part in (view["message"], view["help"], *view["notes"]) if part)
    result: dict[str, Any] = {"ruleId": view["code"], "ruleIndex": rule, "level": view["severity"], "message": {"text": text}}
    location: dict[str, Any] = {}
    if view["location"]:
        location["physicalLocation"] = _physical(view["location"])
    if view["field"]:
        location["logicalLocations"] = [{"fullyQualifiedName": view["field"]}]
    if location:
        result["locations"] = [location]
    if view["fix"]:
        result["fixes"] = [_fix(view["fix"])]
    return result


def _physical(place: LocationView) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": quote(place["file"])}}
    if place["line"]:
        physical["region"] = _region(place)
    return physical


def _region(place: LocationView) -> dict[str, int]:
    region = {"startLine": place["line"], "startColumn": place["column"]}
    if place["end_line"] and place["end_column"]:
        region |= {"endLine": place["end_line"], "endColumn": place["end_column"]}
    return region


def _fix(fix: FixView) -> dict[str, Any]:
    changes = [
        {
            "artifactLocation": {"uri": quote(edit["location"]["file"])},
            "replacements": [{"deletedRegion": _region(edit["location"]), "insertedContent": {"text": edit["replacement"]}}],
        }
        for edit in fix["edits"]
    ]
    return {"description": {"text": fix["description"]}, "artifactChanges": changes}
