"""The plan: everything `run` needs and everything a reviewer wants, in one JSON file with a schema version.

`run plan.json` executes exactly what was reviewed, so a plan carries its own digest and a reader refuses one that was changed,
comes from another schema version, or is not a plan at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import GpuSpan

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A choice that was not taken: what it would have cost, and why it lost."""

    value: str
    cost: str
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One thing a pass decided. field is the spec path it settles (`train.layout`); value is what was chosen, as text."""

    field: str
    value: str
    reason: str
    by: str
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One predicted figure with its interval, its basis, and the terms it is the sum of."""

    name: str
    unit: Literal["s", "bytes", "tokens/s", "tokens/s/gpu", "fraction", "GPU-hours", "tokens"]
    low: float
    mid: float
    high: float
    basis: str
    terms: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One point of the search's Pareto front: a joint choice of layouts and placement with its price.

    chosen marks the plan's own, which comes first; binding says what keeps it from being faster. why: what puts a point on
    the front; note: the options that the layouts do not say.
    """

    train_layout: str
    rollout_layout: str
    placement: str
    step_s: float
    gpu_hours_per_step: float
    headroom_bytes: int
    chosen: bool = False
    note: str = ""
    why: str = ""
    binding: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTransfer:
    """How tensors of one name pattern travel from trainer shards to engine shards.

    pattern holds `{}` where the layer or expert number stands; count tensors share it. *_axis is the dimension a side
    splits (None: whole), *_parts into how many. first_bucket and last_bucket say when they travel.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    train_axis: int | None
    train_parts: int
    rollout_axis: int | None
    rollout_parts: int
    first_bucket: int
    last_bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsRow:
    """One row of the precision table: an op that touches a log-prob, as the trainer and the rollout run it."""

    op: str
    train: str
    rollout: str
    verdict: Literal["same", "removed", "replayed", "corrected", "accepted"]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow:
    """What happens when a task fails or outlives its deadline."""

    task: str
    restart: str
    deadline_s: float
    recovers_from: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSummary:
    """The cluster the plan is for: `nodes` nodes of `gpus_per_node` GPUs each, per group of equal nodes.

    gpu_memory_bytes and host_memory_bytes are those of the group that has least.
    """

    gpu: str
    nodes: int
    gpus_per_node: int
    gpu_memory_bytes: int
    host_memory_bytes: int
    groups: tuple[tuple[str, int, int], ...] = ()  # (gpu, nodes, gpus_per_node) of a heterogeneous cluster

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        if self.groups:
            return sum(nodes * gpus for _, nodes, gpus in self.groups)
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where weights come from: a local Hugging Face checkpoint, or random weights of this configuration."""

    name: str
    hf_config: Mapping[str, Any] | None = None  # random weights from this configuration
    checkpoint: str | None = None
    params_total: int = 0
    params_active: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """Which tokenizer: bytes, the characters of an alphabet, or a local tokenizer file."""

    kind: Literal["byte", "characters", "file"]
    characters: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Rows that a Prompts or Evaluate task names by `name`: a JSONL file, or a generator with its options."""

    name: str
    path: str | None = None
    generator: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the executor needs beyond the graph."""

    seed: int
    model: ModelSource
    teacher: ModelSource | None = None
    tokenizer: TokenizerSource
    data: tuple[DataSource, ...]
    train_dtype: str
    rollout_dtype: str
    max_restarts: int
    tensorboard: bool = True
    code_directory: str | None = None  # where entry points are looked up first: beside the spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A compiled job. See the fields' types for what each part holds."""

    name: str
    tool_version: str
    spec: Mapping[str, Any]
    spec_sha256: str
    sources: tuple[tuple[str, str], ...]  # spec files and their SHA-256
    cluster: ClusterSummary
    run: RunOptions
    graph: TaskGraph
    decisions: tuple[Decision, ...]
    estimates: tuple[Estimate, ...]
    candidates: tuple[Candidate, ...]
    transfers: tuple[TensorTransfer, ...]
    numerics: tuple[NumericsRow, ...]
    failures: tuple[FailureRow, ...]
    environment: tuple[tuple[str, str], ...]  # what must be installed or set: ("torch", ">=2.8"), ("env:NCCL_ALGO", "Ring")
    imports: tuple[str, ...]  # entry points of user code that the run will import
    unread_fields: tuple[str, ...]  # spec fields that no pass read
    diagnostics: tuple[Mapping[str, Any], ...] = ()  # warnings of compilation, in their JSON form

    def decision(self, name: str) -> Decision | None:
        """The decision on a spec field, None where no pass took one."""
        return next((decision for decision in self.decisions if decision.field == name), None)

    def estimate(self, name: str) -> Estimate | None:
        """The estimate of that name, None where there is none."""
        return next((estimate for estimate in self.estimates if estimate.name == name), None)


class PlanFileError(ValueError):
    """A plan file cannot be used: missing, not JSON, not a plan, of another schema version, or changed after it was written."""


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Plan]:
    """Built on first use: it compiles validators for the whole IR."""
    return TypeAdapter(Plan)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data: schema version, the digest of everything else, and the plan."""
    body = _body(plan)
    return {"schema_version": SCHEMA_VERSION, "plan_sha256": _digest(body), "plan": body}


def plan_sha256(plan: Plan) -> str:
    """The digest that names this plan: SHA-256 of its canonical JSON."""
    return _digest(_body(plan))


def _body(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data in one order: facts are a set, whose own order changes from process to process."""
    body: dict[str, Any] = _adapter().dump_python(plan, mode="json")
    body["graph"]["facts"].sort()
    return body


def from_json(data: Any, *, place: str = "plan") -> Plan:
    """The plan in `data`. PlanFileError says what is wrong with it; `place` names the file in the message."""
    if not isinstance(data, dict) or "plan" not in data or "schema_version" not in data:
        raise PlanFileError(f"{place} is not a plan file: no 'plan' and 'schema_version' in it")
    if (version := data["schema_version"]) != SCHEMA_VERSION:
        raise PlanFileError(f"{place} has plan schema version {version}, this miles-plan reads {SCHEMA_VERSION}: compile again")
    found, claimed = _digest(data["plan"]), str(data.get("plan_sha256"))
    if found != claimed:
        raise PlanFileError(f"{place} was changed after it was written: its digest is {found[:12]}, it claims {claimed[:12]}")
    try:
        return _adapter().validate_python(data["plan"])
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanFileError(f"{place}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan file in one step: readers see the old file or the whole new one. OSError names the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(to_json(plan), file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_plan(path: Path) -> Plan:
    """Read a plan file. PlanFileError names the path and what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanFileError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanFileError(f"{path}: {error}") from error
    return from_json(data, place=str(path))


def gpus_touched(plan: Plan) -> tuple[GpuSpan, ...]:
    """The GPU spans of the plan's groups, repeats left out."""
    return tuple(dict.fromkeys(group.gpus for group in plan.graph.groups if group.gpus is not None))


def _digest(body: Any) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
