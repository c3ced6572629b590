"""A reward worker: the process that imports a user's function and calls it, one item after the other.

It begins as a fork of the keeper, sets its own limits, and speaks JSON lines over a socket. What the function prints goes to a
pipe of its own and cannot disturb the messages; the pool keeps the end of it and kills a worker that prints without end. In:
`{"items": [[index, prompt, response, answer, metadata, group], ...]}`. Out: `{"ready": form}` or `{"unloadable": why}` once,
then one `{"index": ..., "score": ..., ...}` an item, each sent as soon as it is known.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from miles_plan.rewards.outcome import Outcome, RewardItem, call_reward, describe, judge
from miles_plan.rewards.process_control import adopt_orphans, die_with_parent, living_children, reap

Form = Literal["item", "group"]
GRACE_S = 0.2


def run_worker(spec: dict[str, Any], keeper: int, channel: int, output: int) -> NoReturn:
    """Become a worker. spec: module, function, path (put before sys.path), memory_bytes (0 = no limit)."""
    _set_up(keeper, output, channel, spec["memory_bytes"])
    with socket.socket(fileno=channel) as stream, stream.makefile("rb") as incoming:
        worker = _Worker(stream)
        sys.path[:0] = [directory for directory in spec["path"] if directory not in sys.path]
        worker.load(spec["module"], spec["function"])
        for line in incoming:
            worker.score(json.loads(line))
    os._exit(0)


class _Worker:
    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.process = os.getpid()
        self.children: set[int] = set()
        self.function: Any = None
        self.form: Form = "item"

    def load(self, module: str, name: str) -> None:
        try:
            self.function = getattr(importlib.import_module(module), name)
            self.form = form_of(self.function)
        except BaseException as error:
            flush()
            self.send({"unloadable": describe(error)})
            os._exit(0)
        self.children = living_children()  # helpers that the module started when it was imported may stay
        self.send({"ready": self.form})

    def score(self, message: dict[str, Any]) -> None:
        indices = [entry[0] for entry in message["items"]]
        items = [RewardItem(*entry[1:]) for entry in message["items"]]
        if self.form == "group":
            outcomes = self.checked(call_group(self.function, items), len(items))
            for index, outcome in zip(indices, outcomes, strict=True):
                self.report(index, outcome)
            return
        for index, item in zip(indices, items, strict=True):
            (outcome,) = self.checked([call_reward(self.function, item)], 1)
            self.report(index, outcome)

    def checked(self, outcomes: list[Outcome], count: int) -> list[Outcome]:
        """The outcomes, unless the call forked: a copy of this process ends here, and other new processes fail the call."""
        if os.getpid() != self.process:
            os._exit(0)
        flush()
        if left := self.left_processes():
            return [Outcome(reason="left_processes", detail=f"left {left} processes running")] * count
        return outcomes

    def left_processes(self) -> int:
        """How many processes the call started that do not end by themselves at once."""
        deadline = time.monotonic() + GRACE_S
        while left := living_children() - self.children:
            if time.monotonic() > deadline:
                return len(left)
            time.sleep(0.002)
        reap(set())
        return 0

    def report(self, index: int, outcome: Outcome) -> None:
        failed = {"reason": outcome.reason, "detail": outcome.detail} if outcome.reason else {}
        self.send({"index": index, "score": outcome.score, "parts": dict(outcome.parts), **failed})

    def send(self, message: dict[str, Any]) -> None:
        self.stream.sendall(json.dumps(message).encode() + b"\n")


def flush() -> None:
    """Put what was printed into the pipe, before the message that it belongs to; user code may have closed its streams."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


def form_of(function: Any) -> Form:
    """`item` for (prompt, response, answer, metadata), `group` for one argument. TypeError for any other signature."""
    if not callable(function):
        raise TypeError(f"a {type(function).__name__} is no function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some compiled functions do not tell
        return "item"
    for form, arguments in (("item", ("", "", "", {})), ("group", ([],))):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return "item" if form == "item" else "group"
    raise TypeError(f"takes {signature}; a reward takes (prompt, response, answer, metadata) or one list of items")


def call_group(function: Any, items: Sequence[RewardItem]) -> list[Outcome]:
    """Run a reward of all samples of one prompt; what is no list of as many scores fails all of them."""
    try:
        returned = function(list(items))
        values = None if isinstance(returned, str | bytes | dict) else list(returned)
    except BaseException as error:
        return [Outcome(reason="raised", detail=describe(error))] * len(items)
    if values is None:
        return [Outcome(reason="wrong_type", detail=f"returned a {type(returned).__name__}, not a list")] * len(items)
    if len(values) != len(items):
        return [Outcome(reason="wrong_count", detail=f"returned {len(values)} scores for {len(items)} items")] * len(items)
    return [judge(value) for value in values]


def _set_up(keeper: int, output: int, channel: int, memory_bytes: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgid(0, 0)
    die_with_parent(keeper)
    adopt_orphans()
    signal.set_wakeup_fd(-1)
    for each in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    os.closerange(3, channel)
    os.closerange(channel + 1, 1 << 16)
    os.set_inheritable(channel, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
