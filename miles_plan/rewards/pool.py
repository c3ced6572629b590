"""Rewards of user code, scored in processes that can be killed: a deadline an item, and no item can harm another.

A reward may raise, hang, return nonsense, end its process, print without end or fork; each costs its own sample a score and the
pool a worker at most. Items are handed out in short runs; what a lost worker had not begun goes to the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from miles_plan.rewards.keeper_process import KeeperProcess
from miles_plan.rewards.outcome import Outcome, RewardItem
from miles_plan.rewards.registry import LocatedReward, RewardError
from miles_plan.rewards.worker_link import LONGEST_MESSAGE_BYTES, PoolLimits, WorkerLink

LONGEST_RUN = 16  # calls handed out in one message
MOST_FAILED_STARTS = 3  # in a row, before a reward that once could be loaded counts as lost

Decision = tuple[list[int], Outcome]
"""Items and the outcome of each of them; no items for a worker that could not start."""


class RewardPool:
    """Workers that have loaded one reward. RewardError when it cannot be loaded. One batch at a time."""

    def __init__(self, reward: LocatedReward, *, workers: int, limits: PoolLimits, search_path: Sequence[str] = ()) -> None:
        self.reward = reward
        self.limits = limits
        self.size = max(1, workers)
        self.takes_groups = False
        self.failed_starts = 0
        self.links: dict[int, WorkerLink] = {}
        self._spec = {
            "module": reward.module,
            "function": reward.function,
            "path": [os.path.abspath(directory) for directory in search_path],
            "memory_bytes": limits.memory_bytes,
        }
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._closed = False
        self._open_keeper()
        try:
            self._await_first_worker()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def outcomes(self, items: Sequence[RewardItem]) -> list[Outcome]:
        """One outcome an item, in order; each item's failure is its own. ValueError for a closed pool."""
        if self._closed:
            raise ValueError(f"the pool of {self.reward.name} is closed")
        with self._lock:
            return _Batch(self, items).run()

    def close(self) -> None:
        """End all workers and whatever they started; returns when they are gone."""
        if self._closed:
            return
        self._closed = True
        for link in list(self.links.values()):
            self._forget(link)
        self._keeper.close()
        self._selector.close()

    def start_worker(self) -> None:
        """Have one more worker; it is idle once it has loaded the reward."""
        number = next(self._numbers)
        with contextlib.suppress(OSError):  # the keeper is gone: `decisions` hears of it and opens another
            channel, output = self._keeper.start_worker(number, self._spec, self.links)
            self.links[number] = WorkerLink(number, channel, output, self.limits)
            self.links[number].register(self._selector)

    def decisions(self) -> Iterator[Decision]:
        """Wait until something happens, and say what it decides."""
        limit_s = min((link.deadline_s for link in self.links.values()), default=0.0)
        for key, _ in self._selector.select(None if limit_s == float("inf") else max(0.0, limit_s - time.monotonic())):
            if key.data is None:
                yield from self._hear_keeper()
            elif key.data.number in self.links:
                yield from self._hear_worker(key.data)
        for link in list(self.links.values()):
            if time.monotonic() >= link.deadline_s:
                yield from self._kill(link, _overdue(link))

    def _open_keeper(self) -> None:
        self._keeper = KeeperProcess()
        self._selector.register(self._keeper.control, selectors.EVENT_READ, None)

    def _await_first_worker(self) -> None:
        self.start_worker()
        while not any(link.state == "idle" for link in self.links.values()):
            for _, outcome in self.decisions():
                said = f"; it printed: {outcome.output.strip()}" if outcome.output.strip() else ""
                raise RewardError(f"reward {self.reward.name} cannot be loaded: {outcome.detail}{said}")

    def _hear_keeper(self) -> Iterator[Decision]:
        try:
            ended = list(self._keeper.ended_workers())
        except (EOFError, OSError):
            self._selector.unregister(self._keeper.control)
            self._keeper.close()
            self._open_keeper()
            for link in list(self.links.values()):
                yield from self._lose(link, Outcome(reason="died", detail="the keeper of the workers ended"))
            return
        for number, code in ended:
            if number in self.links:
                yield from self._hear_worker(self.links[number])  # what it said before it ended still counts
            if number in self.links:
                yield from self._lose(self.links[number], Outcome(reason="died", detail=_death(code)))

    def _hear_worker(self, link: WorkerLink) -> Iterator[Decision]:
        for message in link.messages(self._selector):
            yield from self._take(link, message)
        if link.number not in self.links:
            return
        if len(link.received) > LONGEST_MESSAGE_BYTES:
            yield from self._kill(link, Outcome(reason="too_much_output", detail="returned more than a MiB of parts"))
            return
        link.read_output(self._selector)
        if link.printed_too_much:
            detail = f"printed more than {self.limits.output_bytes:,} bytes"
            yield from self._kill(link, Outcome(reason="too_much_output", detail=detail))

    def _take(self, link: WorkerLink, message: dict[str, Any]) -> Iterator[Decision]:
        if link.number not in self.links:
            return  # killed after an earlier message
        if "ready" in message:
            self.takes_groups = message["ready"] == "group"
            link.state, link.loaded, self.failed_starts = "idle", True, 0
        elif "unloadable" in message:
            link.read_output(self._selector)
            yield from self._lose(link, Outcome(reason="raised", detail=message["unloadable"]))
        elif link.run and message.get("index") in link.run[0]:
            yield from self._take_score(link, message)
        else:
            yield from self._kill(link, Outcome(reason="died", detail="its messages make no sense"))

    def _take_score(self, link: WorkerLink, message: dict[str, Any]) -> Iterator[Decision]:
        link.read_output(self._selector)
        if link.printed_too_much:
            return  # `_hear_worker` kills it, and the score with it
        outcome = Outcome(message["score"], message["parts"], message.get("reason"), message.get("detail", ""))
        yield [message["index"]], link.with_output(outcome) if outcome.reason else outcome
        if link.finish(message["index"]) and outcome.reason == "left_processes":
            self._discard(link)

    def _kill(self, link: WorkerLink, outcome: Outcome) -> Iterator[Decision]:
        self._discard(link)
        yield from self._lose(link, outcome)

    def _discard(self, link: WorkerLink) -> None:
        """Kill a worker; what it was handed stays in `link.run`."""
        self._forget(link)
        with contextlib.suppress(OSError):  # a keeper that is gone has taken its workers along
            self._keeper.kill_worker(link.number)

    def _lose(self, link: WorkerLink, outcome: Outcome) -> Iterator[Decision]:
        """The call a lost worker was at has this outcome; the rest of its run stays in `link.run` for others."""
        self._forget(link)
        if link.run:
            yield link.run.popleft(), link.with_output(outcome)
        elif not link.loaded:
            self.failed_starts += 1
            yield [], link.with_output(outcome)

    def _forget(self, link: WorkerLink) -> None:
        if self.links.pop(link.number, None) is not None:
            link.close(self._selector)


class _Batch:
    """One call of `outcomes`: hands items out, collects outcomes, starts workers for those that were lost."""

    def __init__(self, pool: RewardPool, items: Sequence[RewardItem]) -> None:
        self.pool = pool
        self.items = items
        self.found: dict[int, Outcome] = {}
        self.waiting = deque(_calls(items, groups=pool.takes_groups))
        self.handed: dict[int, WorkerLink] = {}
        self.run_length = max(1, min(LONGEST_RUN, len(self.waiting) // (4 * pool.size)))

    def run(self) -> list[Outcome]:
        while len(self.found) < len(self.items):
            for _ in range(min(self.pool.size, len(self.waiting) + len(self.handed)) - len(self.pool.links)):
                self.pool.start_worker()
            for link in [link for link in self.pool.links.values() if link.state == "idle" and self.waiting]:
                self.hand_out(link)
            for indices, outcome in self.pool.decisions():
                self.found.update(dict.fromkeys(indices, outcome))
                if self.pool.failed_starts >= MOST_FAILED_STARTS:
                    return self.give_up(outcome)
            self.take_back()
        return [self.found[index] for index in range(len(self.items))]

    def hand_out(self, link: WorkerLink) -> None:
        calls = [self.waiting.popleft() for _ in range(min(self.run_length, len(self.waiting)))]
        if calls:
            self.handed[link.number] = link
            link.hand(calls, self.items)

    def take_back(self) -> None:
        """What lost workers had not begun is handed out again."""
        for number, link in list(self.handed.items()):
            if number not in self.pool.links:
                self.waiting.extendleft(reversed(link.run))
            if number not in self.pool.links or link.state == "idle":
                del self.handed[number]

    def give_up(self, outcome: Outcome) -> list[Outcome]:
        detail = f"the reward can no longer be loaded: {outcome.detail}"
        lost = Outcome(reason="died", detail=detail, output=outcome.output)
        return [self.found.get(index, lost) for index in range(len(self.items))]


def _calls(items: Sequence[RewardItem], *, groups: bool) -> list[list[int]]:
    """Indices that one call scores: each its own, or all of one group."""
    if not groups:
        return [[index] for index in range(len(items))]
    found: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        found.setdefault(item.group, []).append(index)
    return list(found.values())


def _overdue(link: WorkerLink) -> Outcome:
    seconds = time.monotonic() - link.begun_s
    match link.state:
        case "starting":
            return Outcome(reason="deadline", detail=f"was not imported within {seconds:.1f} s")
        case "busy":
            return Outcome(reason="deadline", detail=f"killed after {seconds:.1f} s")
        case _:
            return Outcome(reason="died", detail="hung up")


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process was killed by signal {-code}"
