"""`miles-plan explain`: a diagnostic code, a field of the spec, or where the values of a spec come from."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.options import AsJson, Sets
from miles_plan.diagnostics import PAGES, nearest

if TYPE_CHECKING:
    from miles_plan.spec import LoadedJob

What = Annotated[str, typer.Argument(metavar="[CODE | SPEC]", help="A diagnostic code (MP120), or a spec file.")]
FieldOfSpec = Annotated[str, typer.Argument(metavar="[FIELD]", help="With SPEC: only this field or section.")]
FieldName = Annotated[str, typer.Option("--field", metavar="PATH", help="Explain a field, e.g. rollout.temperature.")]


WhyNot = Annotated[
    list[str] | None,
    typer.Option(
        "--why-not",
        metavar="NAME=VALUE",
        help="With SPEC: why the plan is not so, e.g. train.tp=4, rollout.tp=2, placement=colocate, recompute=none, "
        "transport=p2p. May be repeated: all of it at once.",
    ),
]


def explain(
    what: What = "",
    field_of_spec: FieldOfSpec = "",
    field: FieldName = "",
    sets: Sets = None,
    as_json: AsJson = False,
    why_not: WhyNot = None,
) -> None:
    """Explain a diagnostic code, a field (--field), the values of a spec and where each comes from, or a layout not chosen."""
    if why_not and (not what or re.fullmatch(r"(?i)mp\d+", what)):
        raise _usage("--why-not asks about a spec: miles-plan explain SPEC --why-not train.tp=4")
    if why_not:
        from miles_plan.cli.why_not import explain_why_not

        explain_why_not(what, why_not, sets or [], as_json)
    elif field and not what:
        sys.stdout.write(_field(field))
    elif re.fullmatch(r"(?i)mp\d+", what):
        sys.stdout.write(_code(what.upper()))
    elif what:
        _spec(what, field_of_spec or field, sets or [], as_json)
    else:
        raise _usage("name a diagnostic code, a spec, or a field with --field")


def _code(code: str) -> str:
    if code not in PAGES:
        close = nearest(code, PAGES)
        raise _usage(f"there is no code {code}{f'; did you mean {close}?' if close else ''}")
    return PAGES[code].text()


def _field(path: str) -> str:
    from miles_plan.spec.fields import all_fields, pattern_of

    fields = all_fields()
    entry = fields.get(pattern_of(path))
    if entry is None:
        close = nearest(path, fields) or next((each for each in fields if each.rpartition(".")[2] == path), "")
        raise _usage(f"there is no field {path}{f'; did you mean {close}?' if close else ''}")
    lines = [entry.path, "", f"  {entry.meaning}", ""]
    lines.append(f"  value    {entry.kind.phrase}")
    lines.append(f"  default  {'none: it must be given' if entry.required else entry.default_text}")
    lines += [f"  unit     {entry.unit}"] if entry.unit else []
    if entry.inner:
        lines += ["", "  fields"]
        below = [fields[f"{entry.path}{'.*' if entry.kind.many else ''}.{name}"] for name in entry.inner]
        width = max(len(name) for name in entry.inner)
        lines += [f"    {name:<{width}}  {inner.meaning}" for name, inner in zip(entry.inner, below, strict=True)]
    return "\n".join(lines) + "\n"


def _spec(file: str, field: str, sets: list[str], as_json: bool) -> None:
    from miles_plan.spec import load_job

    loaded = load_job(file, sets)
    rows = [row for row in _rows(loaded) if not field or row["field"] == field or row["field"].startswith(f"{field}.")]
    if not rows:
        close = nearest(field, [row["field"] for row in _rows(loaded)])
        raise _usage(f"{file} has no field {field}{f'; did you mean {close}?' if close else ''}")
    if as_json:
        result = {"schema": "miles-plan/explain/1", "spec_sha256": loaded.sha256(), "values": rows}
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    widths = [max(len(row[name]) for row in rows) for name in ("field", "shown")]
    for row in rows:
        sys.stdout.write(f"{row['field']:<{widths[0]}}  {row['shown']:<{min(widths[1], 40)}}  {row['origin']}\n")


def _rows(loaded: LoadedJob) -> list[dict[str, Any]]:
    from miles_plan.spec.section import leaves

    rows = []
    for path, value, _ in leaves(loaded.spec):
        shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        rows.append({"field": path, "value": value, "shown": shown, "origin": str(loaded.origins.of(path))})
    return rows


def _usage(message: str) -> typer.Exit:
    sys.stderr.write(f"{message}\n")
    return typer.Exit(ExitCode.INTERNAL)
