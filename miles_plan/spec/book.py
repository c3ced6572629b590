"""docs/spec.md: how a job spec is read, and every field of it."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plan.spec.fields import FieldEntry, all_fields
from miles_plan.spec.limits import MAX_DEPTH, MAX_FILE_BYTES, MAX_FILES, MAX_NODES

_HEAD = f"""\
# The job spec

A job is one YAML file. Everything has a default or is `auto` (a pass decides, and the plan says why) except what no default
could be right for, so a whole job is short:

```yaml
version: 1
name: grpo-qwen3-30b-a3b
model: {{name: qwen3-30b-a3b}}
cluster: {{gpu: h200, nodes: 2}}
algorithm: {{kind: grpo, clip: 0.2, clip_high: 0.28}}
data: {{prompts: data/dapo.jsonl, reward: math}}
rollout:
  prompts_per_step: 32
  samples_per_prompt: 8
  response_tokens: {{max: 8192, mean: 3500, p99: 8000}}
```

`miles-plan check spec.yaml` tells every mistake at once, with its line and column, the name that was probably meant, and a
[code](diagnostics.md). `miles-plan explain --field rollout.temperature` explains a field, `miles-plan explain spec.yaml` shows
every value and where it comes from, and `miles-plan schema` prints JSON Schema for editors:

```yaml
# yaml-language-server: $schema=miles-plan.schema.json
```

## Reading rules

- **Strict.** An unknown key, a value of another type (`"8"` for 8, `true` for 1), a number that is out of range or not finite
  is an error. Nothing is converted and nothing is ignored.
- **YAML 1.2 scalars.** `1e-6` is a number, `no` and `on` are text, `010` is ten, `12:30:45` and `2026-11-21` are text.
- **Plain YAML.** Anchors and aliases may stand for whole values. Duplicate keys, tags, merge keys (`<<`), directives and second
  documents are refused.
- **Limits.** {MAX_FILE_BYTES:,} bytes a file, {MAX_DEPTH} levels, {MAX_NODES:,} values over all layers once aliases are
  expanded, {MAX_FILES} files.
- **Units are in names**: `_tokens`, `_s`, `_gib`, `_mib`, `_gbps`.

## Layers

Later wins, mappings merge key by key, anything else is replaced:

1. the files that `base:` names (one path or a list, each relative to the file that names it),
2. the file itself,
3. `--set path.to.field=value`, whose value is YAML: `--set rollout.temperature=0.7`, `--set 'rollout.layout={{tp: 2}}'`,
   `--set cluster.groups.1.nodes=4`.

`null` takes back what a base set, where a field can be absent: `model: {{name: null, checkpoint: weights}}`.

A relative path is relative to the file that it is written in, one from `--set` to the current directory. In the resolved spec
all of them are relative to the spec file's directory.

## From Python

```python
from miles_plan.spec import job_from_mapping, load_job

loaded = load_job("spec.yaml", ["rollout.temperature=0.7"])   # PlanError with all findings if it has mistakes
loaded.spec.rollout.temperature                                # typed, frozen
loaded.origins.of("rollout.temperature")                       # default, or file:line:column, or --set:1:21
loaded.at("train.layout.tp")                                   # where a diagnostic about the field points
loaded.resolved(), loaded.sha256()                             # all defaults filled in, and the hash of that

with loaded.ledger.reading_as("place_parallelism"):
    loaded.spec.train.layout                                   # written down: who read which field
loaded.ledger.unread()                                         # fields that nothing read
```

## Fields

`required` fields have no default. A field that is also a section lists its own fields below.
"""


def markdown() -> str:
    """The whole document."""
    fields = all_fields()
    sections = [entry for entry in fields.values() if entry.inner]
    top = _table([entry for path, entry in fields.items() if "." not in path])
    parts = [_HEAD, top]
    for entry in sections:
        prefix = f"{entry.path}.*." if entry.kind.many else f"{entry.path}."
        parts += [f"### `{entry.path}`\n", f"{entry.meaning}\n", _table([fields[f"{prefix}{name}"] for name in entry.inner])]
    return "\n".join(parts)


def _table(entries: list[FieldEntry]) -> str:
    return "\n".join(["| field | value | default | meaning |", "|---|---|---|---|", *map(_row, entries)]) + "\n"


def _row(entry: FieldEntry) -> str:
    default = "required" if entry.required else entry.default_text
    unit = f", in {entry.unit}" if entry.unit and not entry.path.endswith("steps") else ""
    cells = (f"`{entry.path.rpartition('.')[2]}`", "; ".join(_short_forms(entry)) + unit, default, entry.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short_forms(entry: FieldEntry) -> Iterator[str]:
    """The forms of a value; of a section only that it is one, since its fields have a table of their own."""
    words = [form for form in entry.kind.forms if form.startswith("`") or form in ("true", "false")]
    if words:
        yield ", ".join(words)
    if entry.kind.section is not None:
        yield "a list of sections" if entry.kind.many else "a section"
    yield from (form for form in entry.kind.forms if form not in words and "mapping of" not in form)
