"""Who looks on while passes run: `compile --print-after`, `--diff-after`, `--time-passes`. None of them changes anything."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.text import to_text
from miles_plan.passes.base import Pass

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class PrintAfter:
    """Write the graph's text after the named passes; `all` names every one."""

    names: frozenset[str]
    write: Write

    def before(self, each: Pass, graph: TaskGraph) -> None:
        """Nothing to see yet."""

    def after(self, each: Pass, before: TaskGraph, after: TaskGraph) -> None:
        """The whole graph, under a line that names the pass."""
        if self.names & {each.name, "all"}:
            self.write(f"# after {each.name}\n{to_text(after)}")


@dataclass(frozen=True, slots=True)
class DiffAfter:
    """Write what the named passes changed, as a unified diff of the text form."""

    names: frozenset[str]
    write: Write

    def before(self, each: Pass, graph: TaskGraph) -> None:
        """Nothing to see yet."""

    def after(self, each: Pass, before: TaskGraph, after: TaskGraph) -> None:
        """The diff, or a line that says there is none."""
        if not self.names & {each.name, "all"}:
            return
        lines = difflib.unified_diff(
            to_text(before).splitlines(),
            to_text(after).splitlines(),
            f"before {each.name}",
            f"after {each.name}",
            lineterm="",
            n=1,
        )
        self.write("\n".join(lines) + "\n" if before != after else f"# {each.name}: no changes\n")


@dataclass(slots=True)
class TimePasses:
    """Collect each pass's seconds, the verifier's share included."""

    seconds: dict[str, float] = field(default_factory=dict)
    _started_s: float = 0.0

    def before(self, each: Pass, graph: TaskGraph) -> None:
        """Start the clock."""
        self._started_s = time.perf_counter()

    def after(self, each: Pass, before: TaskGraph, after: TaskGraph) -> None:
        """Stop it."""
        self.seconds[each.name] = time.perf_counter() - self._started_s

    def text(self) -> str:
        """A line a pass and the sum."""
        lines = [f"{1000 * seconds:10.1f} ms  {name}" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"{1000 * sum(self.seconds.values()):10.1f} ms  all passes", ""])
