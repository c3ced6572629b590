"""Real ranks for tests: processes that are started once and given function after function to run."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 120


class RankPool:
    """Up to `size` spawned processes; `run` gives ranks 0 .. world_size - 1 a fresh place to meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """function(rank, rendezvous, *arguments) on each rank; results in rank order. Fails with the first rank's traceback."""
        while len(self.workers) < world_size:
            self.workers.append(_start_worker())
        with tempfile.TemporaryDirectory() as directory:
            rendezvous = f"file://{Path(directory) / 'store'}"
            for rank in range(world_size):
                self.workers[rank][1].send((function, rank, rendezvous, arguments))
            results, errors = [], []
            for rank in range(world_size):
                process, connection = self.workers[rank]
                if not connection.poll(TIMEOUT_S):
                    errors.append(f"rank {rank}: no answer after {TIMEOUT_S} s (exit code {process.exitcode})")
                    break
                kind, value = connection.recv()
                (results if kind == "result" else errors).append(value)
                if errors:
                    break
        if errors:
            self.close()
            pytest.fail("\n".join(errors), pytrace=False)
        return results

    def close(self) -> None:
        """End the processes; a later `run` starts new ones."""
        for process, connection in self.workers:
            connection.close()
            process.terminate()
            process.join()
        self.workers = []


def _start_worker() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, rendezvous, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(rank, rendezvous, *arguments))
        except Exception:
            answer = ("error", f"rank {rank}:\n{traceback.format_exc()}")
        connection.send(answer)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
