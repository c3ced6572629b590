"""What the terminal shows while a run goes on: bars and the latest figures where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from miles_plan.backends.executor.dataflow import Instance
from miles_plan.ir.graph import Loop

LINE_EVERY_S = 5.0  # in a pipe; the last iteration of a loop always gets its line
REFRESH_PER_S = 8.0
SHOWN = ("reward_mean", "loss", "max_abs_log_prob_diff", "evaluation_reward_mean")


class Progress:
    """Nothing at all; the base of the two that show something, and what tests use."""

    def start_step(self, what: str, seconds: float) -> None:
        """A part of the start is over."""

    def loop_started(self, loop: str) -> None:
        """A loop begins."""

    def restart_from(self, over: Mapping[str, int]) -> None:
        """So many iterations of each loop are over."""

    def task_started(self, instance: Instance) -> None:
        """A task runs."""

    def waiting(self, name: str, subject: str) -> None:
        """An operation waits for something."""

    def task_completed(self, instance: Instance) -> None:
        """A task is done."""

    def iteration_over(self, line: Mapping[str, Any]) -> None:
        """An iteration is over; `line` is its line of metrics."""

    def note(self, text: str) -> None:
        """Something the user should see."""

    def close(self) -> None:
        """Show no more."""


class LineProgress(Progress):
    """A line every few seconds, for pipes and log files."""

    def __init__(self, loops: tuple[Loop, ...], stream: TextIO) -> None:
        """Lines go to `stream`."""
        self._iterations = {loop.name: loop.iterations for loop in loops}
        self._stream = stream
        self._last = 0.0

    def start_step(self, what: str, seconds: float) -> None:
        """A line for what took long: before the first loop nothing else shows that the run goes on."""
        if seconds > LINE_EVERY_S:
            self._write(f"start: {what}  {seconds:.1f} s")

    def loop_started(self, loop: str) -> None:
        """A line for each loop."""
        self._write(f"{loop}: {self._iterations[loop]} iterations")

    def iteration_over(self, line: Mapping[str, Any]) -> None:
        """A line if the last one is long enough ago."""
        over = line["iteration"] + 1 == self._iterations[line["loop"]]
        if over or time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            self._write(f"{line['loop']} {line['iteration'] + 1}/{self._iterations[line['loop']]}  {figures_text(line)}")

    def note(self, text: str) -> None:
        """A line of its own."""
        self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveProgress(Progress):
    """Bars that move, the figures of the last iteration, and what is being waited for."""

    def __init__(self, loops: tuple[Loop, ...], stream: TextIO) -> None:
        """Start drawing on `stream`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(file=stream, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=REFRESH_PER_S,
        )
        self._tasks = {
            loop.name: self._bars.add_task(loop.name, total=loop.iterations, start=False, figures="") for loop in loops
        }
        self._now = self._bars.add_task("starting", total=None, figures="")
        self._bars.start()

    def loop_started(self, loop: str) -> None:
        """The loop's clock starts."""
        self._bars.start_task(self._tasks[loop])

    def restart_from(self, over: Mapping[str, int]) -> None:
        """Set the bars."""
        for loop, count in over.items():
            self._bars.update(self._tasks[loop], completed=count)

    def waiting(self, name: str, subject: str) -> None:
        """Name what is waited for."""
        self._bars.update(self._now, description=name[:12], figures=subject)

    def iteration_over(self, line: Mapping[str, Any]) -> None:
        """Move the bar."""
        self._bars.update(self._tasks[line["loop"]], advance=1, figures=figures_text(line))

    def note(self, text: str) -> None:
        """Print above the bars."""
        self._bars.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._bars.remove_task(self._now)
        self._bars.stop()


def figures_text(line: Mapping[str, Any]) -> str:
    """The figures of an iteration that people watch."""
    parts = [f"{name.removesuffix('_mean')} {line[name]:.4g}" for name in SHOWN if isinstance(line.get(name), int | float)]
    return "  ".join([*parts, f"{line['step_s']:.2f} s"])


def progress_for(loops: tuple[Loop, ...], stream: TextIO | None = None) -> Progress:
    """What suits the stream (standard error)."""
    stream = stream or sys.stderr
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return LiveProgress(loops, stream)
    return LineProgress(loops, stream)
