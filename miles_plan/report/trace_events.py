"""The Chrome trace event format: slices on tracks, counters, marks and arrows as the JSON events that viewers read.

Phases used, after "Trace Event Format" of the Chromium project: M (names and order of processes and tracks), X (a slice with
its duration), C (a counter), i (a mark), s and f (begin and end of an arrow). Times are microseconds; slices of one track
number must nest, so slices that overlap are spread over lanes, each a track number of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_plan.report.printable import printable

FIRST_TRACK = 100  # a track whose number is the process's own would be taken for its main thread
Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Slice:
    """A named stretch of time, in seconds. key: what arrows call it."""

    name: str
    start_s: float
    end_s: float
    category: str
    args: Mapping[str, Any]
    key: Hashable = None


@dataclass(frozen=True, slots=True)
class Counter:
    """The values of a counter from a moment on."""

    name: str
    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a moment."""

    name: str
    time_s: float
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arrow:
    """From the end of one slice to the begin of another, by their keys; drawn if both are there."""

    name: str
    source: Hashable
    target: Hashable


@dataclass(slots=True)
class ProcessTrace:
    """One process of the trace: its tracks in the order they were first used."""

    pid: int
    name: str
    tracks: dict[str, list[Slice]] = field(default_factory=dict)
    counters: list[Counter] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    def add(self, track: str, piece: Slice) -> None:
        """Put a slice on a track."""
        self.tracks.setdefault(track, []).append(piece)


def events_of(process: ProcessTrace) -> list[Event]:
    """All events of a process, its metadata first."""
    events = [_named(process.pid, "process_name", process.name), _sorted(process.pid, "process_sort_index", process.pid)]
    placed: dict[Hashable, tuple[Event, int]] = {}
    tid = FIRST_TRACK
    for track, slices in process.tracks.items():
        for lane, pieces in enumerate(lanes_of(slices)):
            tid += 1
            name = track if lane == 0 else f"{track} ({lane + 1})"
            events += [_named(process.pid, "thread_name", name, tid), _sorted(process.pid, "thread_sort_index", tid, tid)]
            for piece in pieces:
                event = _slice_event(process.pid, tid, piece)
                events.append(event)
                if piece.key is not None:
                    placed.setdefault(piece.key, (event, nanoseconds(piece.end_s)))
    events += [_counter_event(process.pid, counter) for counter in process.counters]
    events += [_mark_event(process.pid, mark) for mark in process.marks]
    events += list(_arrow_events(process, placed))
    return events


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds: rounded once, so that what touches in seconds touches in the trace."""
    return round(seconds * 1e9)


def lanes_of(slices: list[Slice]) -> list[list[Slice]]:
    """The slices in as few lanes as need be, so that none overlap within a lane."""
    lanes: list[list[Slice]] = []
    for piece in sorted(slices, key=lambda piece: (piece.start_s, piece.end_s)):
        free = next((lane for lane in lanes if nanoseconds(lane[-1].end_s) <= nanoseconds(piece.start_s)), None)
        if free is None:
            lanes.append(free := [])
        free.append(piece)
    return lanes


def _slice_event(pid: int, tid: int, piece: Slice) -> Event:
    begin, end = nanoseconds(piece.start_s), nanoseconds(piece.end_s)
    place = {"ph": "X", "pid": pid, "tid": tid, "ts": begin / 1000, "dur": (end - begin) / 1000}
    return place | {"name": printable(piece.name), "cat": piece.category, "args": dict(piece.args)}


def _counter_event(pid: int, counter: Counter) -> Event:
    return {
        "ph": "C",
        "pid": pid,
        "name": printable(counter.name),
        "ts": nanoseconds(counter.time_s) / 1000,
        "args": {printable(name): value for name, value in counter.values.items()},
    }


def _mark_event(pid: int, mark: Mark) -> Event:
    when = {"ts": nanoseconds(mark.time_s) / 1000, "s": "p"}
    return {"ph": "i", "pid": pid, "tid": 0, "name": printable(mark.name), "cat": "event", **when, "args": dict(mark.args)}


def _arrow_events(process: ProcessTrace, placed: Mapping[Hashable, tuple[Event, int]]) -> Iterator[Event]:
    """A pair of events an arrow; an arrow's foot lies just inside the end of its slice, where viewers look for the slice."""
    for number, arrow in enumerate(process.arrows):
        if arrow.source not in placed or arrow.target not in placed:
            continue
        source, end = placed[arrow.source]
        target, _ = placed[arrow.target]
        same = {"pid": process.pid, "id": process.pid * 10**9 + number, "name": arrow.name, "cat": "edge"}
        foot = max(source["ts"], (end - 1) / 1000)
        yield {"ph": "s", **same, "tid": source["tid"], "ts": foot}
        yield {"ph": "f", **same, "tid": target["tid"], "ts": max(target["ts"], foot), "bp": "e"}


def _named(pid: int, kind: str, name: str, tid: int = 0) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": printable(name)}}


def _sorted(pid: int, kind: str, index: int, tid: int = 0) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"sort_index": index}}
