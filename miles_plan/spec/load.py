"""From files, overrides or a mapping to a `LoadedJob`: the spec, where its values come from, and who reads them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles_plan.diagnostics import Diagnostic, Location, PlanError, by_place
from miles_plan.spec.fields import all_fields, pattern_of
from miles_plan.spec.job import JobSpec
from miles_plan.spec.layers import Layers
from miles_plan.spec.ledger import Ledger
from miles_plan.spec.limits import MAX_FINDINGS
from miles_plan.spec.origins import Origins
from miles_plan.spec.section import attach, leaves
from miles_plan.spec.tree import Entry, ListNode, MapNode, Node, ScalarNode, from_data
from miles_plan.spec.validate import validate

MAPPING_FILE = "<mapping>"
OF_ABSENCE = frozenset({"MP121", "MP130", "MP133"})  # say that something is not given


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedJob:
    """A valid spec and what is known about it.

    directory: that of the spec file; every relative path in the spec is relative to it. sources: text of each file read, for
    diagnostics that show a line.
    """

    spec: JobSpec
    origins: Origins
    ledger: Ledger
    sources: Mapping[str, str]
    directory: Path

    def at(self, path: str) -> Location:
        """Where a diagnostic about the field at `path` points."""
        return self.origins.at(path)

    def file(self, name: str) -> Path:
        """A path that the spec names, ready to open."""
        return self.directory / name

    def resolved(self) -> dict[str, Any]:
        """The spec with every default filled in, as JSON data."""
        return self.spec.model_dump(mode="json")

    def sha256(self) -> str:
        """Hash of the resolved spec: equal for specs that mean the same, however they are written or layered."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_job(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> LoadedJob:
    """The job in the spec file at `path`, with `sets` (`rollout.temperature=0.7`) on top.

    Raises PlanError with every mistake found in the files, the overrides, the fields and the rules between them.
    """
    file = os.fspath(path)
    layers = Layers()
    root = layers.read(file)
    merged = layers.override(root or MapNode({}, Location(file)), sets)
    if root is None:
        raise _refused(layers, [])
    return _loaded(_rebase(merged, layers, Path(file).parent), file, layers)


def job_from_mapping(data: Mapping[str, Any], directory: str | os.PathLike[str] = ".") -> LoadedJob:
    """As `load_job`, for a job that is plain data. Diagnostics name fields, not lines. TypeError if it is not JSON-like."""
    root = from_data(data, MAPPING_FILE)
    assert isinstance(root, MapNode)
    return _loaded(root, MAPPING_FILE, Layers(), Path(directory))


def _loaded(root: MapNode, file: str, layers: Layers, directory: Path | None = None) -> LoadedJob:
    result = validate(root, file)
    if isinstance(result, list) or layers.findings:
        raise _refused(layers, result if isinstance(result, list) else [])
    marks = list(leaves(result))
    ledger = Ledger((path for path, _, _ in marks), {path: inert.reason for path, _, inert in marks if inert})
    attach(result, ledger)
    return LoadedJob(
        spec=result,
        origins=Origins(root, file),
        ledger=ledger,
        sources=dict(layers.sources),
        directory=Path(file).parent if directory is None else directory,
    )


def _refused(layers: Layers, fields: list[Diagnostic]) -> PlanError:
    """Everything found, but not what only follows from a mistake in the reading of the files, and not too much."""
    taken = {each.location for each in layers.findings if each.location and each.location.line}
    follows = OF_ABSENCE if layers.incomplete else frozenset()
    found = by_place([*layers.findings, *(each for each in fields if each.location not in taken and each.code not in follows)])
    if len(found) > MAX_FINDINGS:
        last = found[MAX_FINDINGS - 1]
        found = (*found[: MAX_FINDINGS - 1], replace(last, notes=(*last.notes, "further findings are not shown")))
    return PlanError(found, layers.sources)


def _rebase(root: MapNode, layers: Layers, directory: Path) -> MapNode:
    """Make relative paths that were written elsewhere (base files, `--set`) relative to the spec file's directory."""

    def visit(node: Node, path: str) -> Node:
        if isinstance(node, MapNode):
            below = {key: visit(entry.value, f"{path}.{key}" if path else key) for key, entry in node.entries.items()}
            return MapNode(
                {key: Entry(key, node.entries[key].key_location, value) for key, value in below.items()}, node.location
            )
        if isinstance(node, ListNode):
            return ListNode(tuple(visit(item, f"{path}.{index}") for index, item in enumerate(node.items)), node.location)
        field = all_fields().get(pattern_of(path))
        if field is None or field.kind.path is None or not isinstance(node.value, str) or not node.value:
            return node
        written_in = layers.directories[node.location.file]
        if os.path.isabs(node.value) or written_in == directory:
            return node
        moved = os.path.relpath(written_in / node.value, directory)
        return ScalarNode(moved, node.text, node.quoted, node.location)

    rebased = visit(root, "")
    assert isinstance(rebased, MapNode)
    return rebased
