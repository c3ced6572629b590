"""Layering: files that `base:` names, then the file itself, then `--set`; later wins, mappings merge key by key.

Every node keeps the place it was written at, so the merged tree still knows where each value comes from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from miles_plan.diagnostics import Diagnostic, Location, error
from miles_plan.spec.limits import MAX_DEPTH, MAX_FILES, MAX_NODES
from miles_plan.spec.source_text import read_source
from miles_plan.spec.tree import Entry, ListNode, MapNode, Node, ScalarNode, child
from miles_plan.spec.yaml_tree import parse_yaml

SET_FILE = "--set"
_SET = re.compile(r"(?P<path>[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)=(?P<value>.*)")


@dataclass
class Layers:
    """Files read so far: their texts and directories by display name, and what is wrong with them.

    `incomplete`: some file could not be read, so what the merged spec lacks may well stand there.
    """

    sources: dict[str, str] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=dict)
    findings: list[Diagnostic] = field(default_factory=list)
    incomplete: bool = False
    _files: int = 0
    _budget: int = MAX_NODES  # values that all files together may still hold

    def read(self, file: str, named_at: Location | None = None, above: tuple[Path, ...] = ()) -> MapNode | None:
        """The mapping in `file` on top of its bases; None if it cannot be had. `above` are the files that led here."""
        path = Path(file)
        real = Path(os.path.realpath(path)) if "\0" not in file else path
        if real in above:
            circle = " -> ".join(each.name for each in (*above[above.index(real) :], real))
            self.findings.append(error("MP104", f"`base:` leads back to `{file}`", named_at, notes=[circle]))
            return None
        self._files += 1
        if self._files > MAX_FILES:
            self.findings.append(error("MP104", f"`base:` leads to more than {MAX_FILES} files", named_at))
            return None
        text = read_source(path, file, named_at)
        if isinstance(text, Diagnostic):
            self.findings.append(text)
            return None
        self.sources[file] = text
        self.directories[file] = path.parent
        parsed = parse_yaml(text, file, budget=self._budget)
        root, self._budget = parsed.root, parsed.budget
        self.findings.extend(parsed.findings)
        if root is None and not parsed.findings:
            self.findings.append(error("MP122", "the file is empty", Location(file, 1, 1), help="a spec is a mapping of keys"))
        if not isinstance(root, MapNode):
            if root is not None:
                self.findings.append(error("MP122", "a spec is a mapping of keys", root.location))
            return None
        return self._on_bases(root, file, (*above, real))

    def _on_bases(self, root: MapNode, file: str, above: tuple[Path, ...]) -> MapNode:
        own = {key: entry for key, entry in root.entries.items() if key != "base"}
        lower: list[MapNode] = []
        for name, where in self._base_names(root):
            display = os.path.normpath(os.path.join(os.path.dirname(file), name))
            base = self.read(display, where, above)
            if base is None:
                self.incomplete = True
            else:
                lower.append(base)
        return reduce(merge_maps, [*lower, MapNode(own, root.location)])

    def _base_names(self, root: MapNode) -> list[tuple[str, Location]]:
        if "base" not in root.entries:
            return []
        node = root.entries["base"].value
        items = node.items if isinstance(node, ListNode) else (node,)
        names: list[tuple[str, Location]] = []
        for item in items:
            if isinstance(item, ScalarNode) and isinstance(item.value, str) and item.value:
                names.append((item.value, item.location))
            else:
                where = item.location if item.location.end_column else root.entries["base"].key_location
                self.findings.append(error("MP104", "`base` must be a path or a list of paths", where, field="base"))
                self.incomplete = True
        return names

    def override(self, root: MapNode, sets: Sequence[str]) -> MapNode:
        """`root` with each `path=value` of `sets` put in, in order."""
        self.sources[SET_FILE] = "\n".join(each.replace("\n", " ").replace("\r", " ") for each in sets)
        self.directories[SET_FILE] = Path()
        for line, text in enumerate(sets, start=1):
            root = self._override_one(root, text, line)
        return root

    def _override_one(self, root: MapNode, text: str, line: int) -> MapNode:
        whole = Location(SET_FILE, line, 1, line, len(text) + 1)
        parts = _SET.fullmatch(text) if text.isprintable() else None
        steps = parts["path"].split(".") if parts else []
        if parts is None or len(steps) > MAX_DEPTH:
            help = "for example `rollout.temperature=0.7`"
            self.findings.append(error("MP105", "an override has the form `path.to.field=value`", whole, help=help))
            return root
        if steps[0] == "base":
            self.findings.append(error("MP105", "`base` can only be set in a file", whole, field="base"))
            return root
        column = parts.start("value") + 1
        parsed = parse_yaml(parts["value"], SET_FILE, line=line, column=column)
        self.findings.extend(parsed.findings)
        if parsed.findings:
            return root
        nothing = ScalarNode(None, "", False, Location(SET_FILE, line, column, line, column))
        changed = _put(root, steps, parsed.root or nothing, line, 1)
        assert isinstance(changed, MapNode)
        return changed


def merge_maps(lower: MapNode, upper: MapNode) -> MapNode:
    """`upper` over `lower`: mappings merge, anything else is replaced."""
    entries = dict(lower.entries)
    for key, entry in upper.entries.items():
        below = entries[key].value if key in entries else None
        if isinstance(below, MapNode) and isinstance(entry.value, MapNode):
            entry = Entry(key, entry.key_location, merge_maps(below, entry.value))
        entries[key] = entry
    return MapNode(entries, upper.location)


def _put(node: Node | None, steps: list[str], value: Node, line: int, column: int) -> Node:
    """`node` with `value` at `steps`; mappings that are missing or in the way are made."""
    if not steps:
        below = isinstance(node, MapNode) and isinstance(value, MapNode)
        return merge_maps(node, value) if below else value  # type: ignore[arg-type]  # both are MapNode here
    step, where = steps[0], Location(SET_FILE, line, column, line, column + len(steps[0]))
    inner = _put(child(node, step) if node else None, steps[1:], value, line, column + len(step) + 1)
    if isinstance(node, ListNode) and child(node, step) is not None:
        index = int(step)
        return ListNode((*node.items[:index], inner, *node.items[index + 1 :]), node.location)
    entries = dict(node.entries) if isinstance(node, MapNode) else {}
    key_location = entries[step].key_location if step in entries and len(steps) > 1 else where
    entries[step] = Entry(step, key_location, inner)
    return MapNode(entries, node.location if isinstance(node, MapNode) else where)
