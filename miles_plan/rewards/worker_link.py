"""The pool's end of one worker: what it was handed, what it says, what it prints, and when its patience with it ends."""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from miles_plan.rewards.outcome import Outcome, RewardItem

LONGEST_MESSAGE_BYTES = 1 << 20  # from a worker: a score and a few named parts
KEPT_OUTPUT_BYTES = 2_000
FAREWELL_S = 2.0  # between a worker's hanging up and the news of its death

State = Literal["starting", "idle", "busy", "leaving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """What a worker may use.

    deadline_s: a call with one item; a call with a group has that much for each of its items. startup_s: to import the reward.
    memory_bytes: address space, 0 for no limit. output_bytes: what one call may print.
    """

    deadline_s: float
    startup_s: float = 60.0
    memory_bytes: int = 4 << 30
    output_bytes: int = 1 << 20


@dataclass(slots=True, eq=False)
class WorkerLink:
    """One worker. run: the calls it was handed and has not finished, each the indices of its items; begun_s: of the first."""

    number: int
    channel: socket.socket
    output: int
    limits: PoolLimits
    state: State = "starting"
    loaded: bool = False
    begun_s: float = field(default_factory=time.monotonic)
    run: deque[list[int]] = field(default_factory=deque)
    received: bytes = b""
    printed: int = 0
    tail: bytes = b""

    @property
    def deadline_s(self) -> float:
        """When it must have got on, on the monotonic clock."""
        match self.state:
            case "starting":
                return self.begun_s + self.limits.startup_s
            case "busy":
                return self.begun_s + self.limits.deadline_s * len(self.run[0])
            case "leaving":
                return self.begun_s + FAREWELL_S
            case _:
                return float("inf")

    @property
    def printed_too_much(self) -> bool:
        """Whether the current call printed more than it may."""
        return self.printed > self.limits.output_bytes

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have both descriptors watched."""
        selector.register(self.channel, selectors.EVENT_READ, self)
        selector.register(self.output, selectors.EVENT_READ, self)

    def hand(self, calls: Sequence[list[int]], items: Sequence[RewardItem]) -> None:
        """Send a run of calls. One that cannot be sent is found lost when the worker's end is heard of."""
        self.run, self.state = deque(calls), "busy"
        self.begin_call()
        message = json.dumps({"items": [[index, *items[index]] for call in calls for index in call]})
        self.channel.settimeout(FAREWELL_S)
        try:
            self.channel.sendall(message.encode() + b"\n")
        except OSError:
            self.leave()
        finally:
            self.channel.setblocking(False)

    def begin_call(self) -> None:
        """Start the clock and the count of printed bytes anew."""
        self.begun_s, self.printed, self.tail = time.monotonic(), 0, b""

    def finish(self, index: int) -> bool:
        """Note that an item of the current call is scored; True when it was the call's last."""
        call = self.run[0]
        call.remove(index)
        if call:
            return False
        self.run.popleft()
        self.begin_call()
        if not self.run:
            self.state = "idle"
        return True

    def leave(self) -> None:
        """The worker hung up: it has a moment to be reported dead."""
        if self.state != "leaving":
            self.state, self.begun_s = "leaving", time.monotonic()

    def messages(self, selector: selectors.BaseSelector) -> Iterator[dict[str, Any]]:
        """What the worker has sent by now."""
        while self.channel.fileno() >= 0 and len(self.received) <= LONGEST_MESSAGE_BYTES:
            try:
                data = self.channel.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                _unregister(selector, self.channel)
                self.leave()
                return
            *lines, self.received = (self.received + data).split(b"\n")
            yield from map(_message, lines)

    def read_output(self, selector: selectors.BaseSelector) -> None:
        """Count what the worker has printed by now and keep the end of it."""
        while self.channel.fileno() >= 0 and not self.printed_too_much:
            try:
                data = os.read(self.output, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                _unregister(selector, self.output)
                return
            self.printed += len(data)
            self.tail = (self.tail + data)[-KEPT_OUTPUT_BYTES:]

    def with_output(self, outcome: Outcome) -> Outcome:
        """The outcome with the end of what the current call printed."""
        text = self.tail.decode("utf-8", errors="replace")
        return Outcome(outcome.score, outcome.parts, outcome.reason, outcome.detail, text)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Close our ends; a worker that lives still then ends by itself."""
        _unregister(selector, self.channel)
        _unregister(selector, self.output)
        self.channel.close()
        os.close(self.output)


def _message(line: bytes) -> dict[str, Any]:
    """A message; empty when the reward wrote something of its own to the socket."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _unregister(selector: selectors.BaseSelector, channel: socket.socket | int) -> None:
    if channel in selector.get_map():
        selector.unregister(channel)
