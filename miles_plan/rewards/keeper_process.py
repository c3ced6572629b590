"""The pool's end of the keeper: it spawns the keeper, asks it for workers, and hears which have ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CLOSE_S = 10.0

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[3]); from miles_plan.rewards.keeper import main; main()"


class KeeperProcess:
    """A running keeper. One thread at a time may use it."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        with theirs:
            # The keeper finds modules as this process does, whether installed, editable, or run from a checkout.
            arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only this process, which closes the pool in order
            )
        self.pending = b""

    def start_worker(self, worker: int, spec: Mapping[str, Any], beside: Iterable[int]) -> tuple[socket.socket, int]:
        """Ask for a worker `beside` those that live; returns our end of its message socket and of its output pipe.

        OSError when the keeper is gone.
        """
        ours, theirs = socket.socketpair()
        output_read, output_write = os.pipe()
        try:
            message = json.dumps({"start": worker, "spec": dict(spec), "beside": list(beside)}).encode() + b"\n"
            descriptors = [theirs.fileno(), output_write]
            sent = socket.send_fds(self.control, [message], descriptors)
            self.control.sendall(message[sent:])
        except OSError:
            ours.close()
            os.close(output_read)
            raise
        finally:
            theirs.close()
            os.close(output_write)
        ours.setblocking(False)
        os.set_blocking(output_read, False)
        return ours, output_read

    def kill_worker(self, worker: int) -> None:
        """Ask for a worker's death and that of all it started. OSError when the keeper is gone, and with it the worker."""
        self.control.sendall(json.dumps({"kill": worker}).encode() + b"\n")

    def ended_workers(self) -> Iterator[tuple[int, int]]:
        """Worker and exit code of each that has ended; call when the control socket is readable. EOFError: no keeper."""
        data = self.control.recv(1 << 16)
        if not data:
            raise EOFError("the keeper of the reward workers has ended")
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            yield message["ended"], message["code"]

    def close(self) -> None:
        """End the keeper and everything below it; returns when they are gone."""
        with contextlib.suppress(OSError):
            self.control.sendall(b'{"quit": true}\n')  # closing tells it nothing while a fork of this process holds the socket
        self.control.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
