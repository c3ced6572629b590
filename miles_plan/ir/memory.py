"""The memory timeline: what every GPU and every host holds in each phase of an iteration, term by term."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miles_plan.ir.group import GpuSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerm:
    """One named part of a footprint, in bytes; `owner` is the group it belongs to."""

    name: str
    owner: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPhase:
    """What is resident during one phase; `task` is the task whose run it is. high_bytes is the upper end of the estimate."""

    name: str
    task: str
    terms: tuple[MemoryTerm, ...]
    high_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the terms."""
        return sum(term.size_bytes for term in self.terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTimeline:
    """Phases of one kind of place in the order they happen.

    place: `gpu` (each GPU of the span holds this) or `host` (each node that the span touches holds this); the most loaded GPU
    of the span stands for all. capacity_bytes is what may be used, after the margin.
    """

    place: str
    gpus: GpuSpan
    capacity_bytes: int
    margin_bytes: int
    phases: tuple[MemoryPhase, ...]

    @property
    def peak(self) -> MemoryPhase:
        """The phase with the largest total."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    def problems(self) -> Iterator[str]:
        """Phases over capacity, each with its largest term."""
        for phase in self.phases:
            if phase.total_bytes > self.capacity_bytes:
                worst = max(phase.terms, key=lambda term: term.size_bytes)
                yield (
                    f"{self.place} {self.gpus}: phase '{phase.name}' holds {phase.total_bytes} of {self.capacity_bytes} bytes; "
                    f"largest: {worst.owner}.{worst.name} {worst.size_bytes}"
                )
