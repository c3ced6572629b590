"""The process between a pool and its workers: it forks them, kills them with all their offspring, and dies with the pool.

A pool lives in a big process (torch, Ray, threads) that should not fork; the keeper is a small one that may. It adopts whatever
its workers leave behind, so killing a worker kills the processes that the reward started, also those that left its process
group. When the pool's process ends, however it ends, the keeper kills everything below itself and ends too.

Messages on the control socket are JSON lines. In: `{"start": id, "spec": {...}, "beside": [ids]}` with the worker's two
descriptors attached (workers that are not named in "beside" end), `{"kill": id}`, `{"quit": true}`. Out:
`{"ended": id, "code": exit code}`, the code negative for a signal.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from miles_plan.rewards.process_control import adopt_orphans, kill, kill_group, living_children, reap
from miles_plan.rewards.worker import run_worker

PARENT_CHECK_S = 0.5
LONGEST_KILL_S = 5.0
WORKER_BROKE = 70  # exit code of a worker whose own code, not the reward's, raised: EX_SOFTWARE of sysexits.h
_MESSAGE_BYTES = 1 << 16


class Keeper:
    """State of the keeper: which process is which worker."""

    def __init__(self, control: socket.socket, parent: int) -> None:
        self.control = control
        self.parent = parent
        self.workers: dict[int, int] = {}  # process -> worker id
        self.ended: dict[int, int] = {}  # process -> exit code, not told yet
        self.condemned: set[int] = set()  # workers to be killed until they have ended
        self.pending = b""
        self.descriptors: list[int] = []
        self.wake_read, wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the pool's process is gone."""
        while os.getppid() == self.parent:
            readable, _, _ = select.select([self.control.fileno(), self.wake_read], [], [], PARENT_CHECK_S)
            if self.wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake_read, 4096)
            self.collect()
            self.kill_condemned()
            if self.control.fileno() in readable and not self.receive():
                return

    def receive(self) -> bool:
        """Take what the pool sent; False when it has closed the socket."""
        ancillary = socket.CMSG_SPACE(16 * array.array("i").itemsize)
        data, extra, _, _ = self.control.recvmsg(_MESSAGE_BYTES, ancillary, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        for level, kind, content in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                self.descriptors += found
        if not data:
            return False
        *lines, self.pending = (self.pending + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            self.obey(message)
        return not any("quit" in message for message in messages)

    def obey(self, message: dict[str, Any]) -> None:
        """Start or kill a worker."""
        if "start" in message:
            channel, output = self.descriptors[:2]
            del self.descriptors[:2]
            self.condemned |= set(self.workers.values()) - set(message["beside"])
            self.start(message["start"], message["spec"], channel, output)
        elif "kill" in message:
            self.condemned.add(message["kill"])
            self.kill_condemned()

    def kill_condemned(self) -> None:
        """Kill the workers that are to end; again at every turn, until they are collected."""
        self.condemned &= set(self.workers.values())
        for process in [process for process, worker in self.workers.items() if worker in self.condemned]:
            kill_group(process)
            kill(process)  # it may not have made its group yet

    def start(self, worker: int, spec: dict[str, Any], channel: int, output: int) -> None:
        """Fork a worker; in the child this does not return."""
        keeper = os.getpid()
        process = os.fork()
        if process == 0:
            _become_worker(spec, keeper, channel, output)
        os.close(channel)
        os.close(output)
        with contextlib.suppress(OSError):
            os.setpgid(process, process)  # here as in the child: whichever runs first, the group exists before a kill
        self.workers[process] = worker

    def collect(self) -> None:
        """Tell the pool which workers have ended, all they left behind killed first."""
        self.ended |= reap(set(self.workers))
        if not self.ended:
            return
        self.kill_strays()
        for process, code in self.ended.items():
            message = {"ended": self.workers.pop(process), "code": code}
            with contextlib.suppress(OSError):
                self.control.sendall(json.dumps(message).encode() + b"\n")
        self.ended = {}

    def kill_strays(self) -> None:
        """Kill every process below this one but living workers; children of the killed become ours and are next."""
        deadline = time.monotonic() + LONGEST_KILL_S
        while (strays := living_children() - set(self.workers)) and time.monotonic() < deadline:
            for process in strays:
                kill_group(process)
                kill(process)
            time.sleep(0.001)
            self.ended |= reap(set(self.workers))


def main() -> NoReturn:
    """`python -c ... FD PARENT`: serve the pool at the other end of the control socket, then kill all there is below."""
    keeper = Keeper(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool's process, which then closes the pool
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        keeper.run()
    finally:
        keeper.workers = {}
        keeper.kill_strays()
        os._exit(0)


def _become_worker(spec: dict[str, Any], keeper: int, channel: int, output: int) -> NoReturn:
    try:
        run_worker(spec, keeper, channel, output)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(WORKER_BROKE)
