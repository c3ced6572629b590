"""The spec as JSON Schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

from miles_plan.spec.job import JobSpec

_BASE = {
    "description": "Spec files that this one is layered on, in order; a path is relative to this file.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def json_schema() -> dict[str, Any]:
    """The schema of a spec file: the fields of `JobSpec`, and `base`, which only files have.

    A file with a `base` may leave required fields to it.
    """
    schema = JobSpec.model_json_schema()
    required = schema.pop("required")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "miles-plan job spec",
        "properties": {"base": _BASE, **schema["properties"]},
        "anyOf": [{"required": ["base"]}, {"required": required}],
    }
