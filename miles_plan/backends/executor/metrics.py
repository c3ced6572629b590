"""Metrics: what the tasks of an iteration report becomes one JSON line and, where asked, TensorBoard scalars."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.durable_files import naming, write_durably
from miles_plan.backends.executor.events import read_lines

OF_THE_LINE = ("loop", "iteration", "step", "step_s", "tokens_per_s")  # what no task reports


class MetricsFile:
    """Collects the figures of each iteration and writes its line when the iteration is over.

    A line holds `loop`, `iteration`, `step` (iterations of all loops so far, from 1), `step_s` (seconds since the line before
    it), `task_s` (seconds of each task), and the tasks' figures by name.
    """

    def __init__(self, path: Path, *, loop_offset: Mapping[str, int], tensorboard: Path | None) -> None:
        """Open for appending; `loop_offset` is how many iterations come before each loop. OSError names the path."""
        self.path, self.loop_offset = path, loop_offset
        self._open: dict[tuple[str, int], dict[str, Any]] = {}
        self._last = time.monotonic()
        self._scalars = _ScalarWriter(tensorboard) if tensorboard else None
        with naming(path):
            self._file = path.open("a", encoding="utf-8")

    def add(self, loop: str, iteration: int, task: str, seconds: float, figures: Mapping[str, float]) -> None:
        """Figures that one task reports; a name that two tasks report belongs to the later one."""
        line = self._open.setdefault((loop, iteration), {"task_s": {}})
        line["task_s"][task] = round(seconds, 5)
        line.update(figures)

    def close_iteration(self, loop: str, iteration: int) -> Mapping[str, Any]:
        """Write the iteration's line and return it."""
        line = self._line(loop, iteration)
        self._open.pop((loop, iteration), None)
        self._last = time.monotonic()
        self._write(line)
        return line

    def unwritten(self, loop: str, iteration: int) -> list[dict[str, Any]]:
        """Lines of iterations up to this one that are not written yet: a checkpoint holds them, or a crash would lose them."""
        return [self._line(*key) for key in sorted(self._open) if key[0] == loop and key[1] <= iteration]

    def _line(self, loop: str, iteration: int) -> dict[str, Any]:
        step_s = time.monotonic() - self._last
        figures = self._open.get((loop, iteration), {"task_s": {}})
        step = self.loop_offset[loop] + iteration + 1
        line = {"loop": loop, "iteration": iteration, "step": step, "step_s": round(step_s, 5), **figures}
        if tokens := figures.get("tokens", figures.get("train_tokens")):
            line["tokens_per_s"] = tokens / max(step_s, 1e-9)
        return line

    def _write(self, line: Mapping[str, Any]) -> None:
        with naming(self.path):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        if self._scalars:
            self._scalars.write(line["step"], line)

    def restart_from(self, kept: Mapping[str, int], unwritten: Sequence[Mapping[str, Any]] = ()) -> None:
        """Per loop, drop the lines of iterations from `kept[loop]` on, and what is open: they will run again.

        Lines that a checkpoint held because they were `unwritten` then are added where they are missing; those of an iteration
        that is not quite over are what its remaining tasks add to.
        """
        self._open.clear()
        self._file.close()
        cut_metrics(self.path, kept)
        with naming(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        there = {(line["loop"], line["iteration"]) for line in read_metrics(self.path)}
        for line in unwritten:
            key = line["loop"], line["iteration"]
            if key[1] >= kept.get(key[0], 0):
                self._open[key] = {name: figure for name, figure in line.items() if name not in OF_THE_LINE}
            elif key not in there:
                self._write(line)
        self._last = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._scalars:
            self._scalars.close()


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl."""
    return list(read_lines(path))


def cut_metrics(path: Path, kept: Mapping[str, int]) -> int:
    """Drop the lines of iterations that will run again: per loop, those from `kept[loop]` on. Returns how many."""
    lines = read_metrics(path)
    stay = [line for line in lines if line["iteration"] < kept.get(line["loop"], 0)]
    if len(stay) < len(lines) or path.exists():
        write_durably(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in stay).encode())
    return len(lines) - len(stay)


class _ScalarWriter:
    """TensorBoard's event file, written without torch so that the driver stays light."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder), max_queue_size=50, flush_secs=5)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        loop = line["loop"]
        figures = {**line, **{f"task_s/{task}": seconds for task, seconds in line["task_s"].items()}}
        values = [
            Summary.Value(tag=f"{loop}/{name}", simple_value=float(figure))
            for name, figure in figures.items()
            if isinstance(figure, int | float) and name not in ("iteration", "step")
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
