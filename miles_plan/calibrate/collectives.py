"""Collectives between the GPUs of this machine, one process a GPU, and the memory that their communicators take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.queues import Queue
from queue import Empty

import torch
import torch.distributed as dist

from miles_plan.calibrate.points import CollectiveOp, CollectivePoint, MemoryPoint
from miles_plan.calibrate.timing import Call, time_calls

OPS: tuple[CollectiveOp, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
START_S = 90.0
"""Patience with processes that start, import torch and set up a communicator."""

REPETITIONS, WARM_UPS = 9, 5

Found = tuple[tuple[CollectivePoint, ...], tuple[MemoryPoint, ...]]


class CollectivesFailedError(RuntimeError):
    """The processes did not finish: the message says what the first of them said."""


def measure_collectives(device_type: str, ranks: int, sizes_bytes: Sequence[int], budget_s: float) -> Found:
    """Every collective over `ranks` GPUs at every size (bytes of the whole buffer, split evenly where an op splits it).

    Raises:
        CollectivesFailedError: a process died or none answered in time.
    """
    context = multiprocessing.get_context("spawn")
    answers: Queue[Found | str] = context.Queue()
    with tempfile.TemporaryDirectory(prefix="miles-plan-calibrate-") as folder:
        processes = [
            context.Process(
                target=_rank,
                args=(rank, ranks, device_type, tuple(sizes_bytes), budget_s, os.path.join(folder, "store"), answers),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        answer: Found | str | None = None
        try:
            answer = answers.get(timeout=START_S + 3 * budget_s)
        except Empty:
            raise CollectivesFailedError(f"no answer from {ranks} processes in {START_S + 3 * budget_s:.0f} s") from None
        finally:
            for process in processes:  # after a failure or Ctrl-C nobody waits for those that are left
                process.join(5.0 if isinstance(answer, tuple) else 0.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    if isinstance(answer, str):
        raise CollectivesFailedError(answer)
    return answer


def _rank(
    rank: int, ranks: int, device_type: str, sizes: tuple[int, ...], budget_s: float, store: str, answers: Queue[Found | str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    # torch 2.13 renames two collectives whose old names 2.8 needs, and tells that a barrier picks the current device
    for kind in (FutureWarning, UserWarning):
        warnings.simplefilter("ignore", kind)
    try:
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=START_S),
        )
        memory = _communicators(ranks, device)
        points = _points(rank, ranks, device, sizes, budget_s)
        if rank == 0:
            answers.put((points, memory))
        dist.destroy_process_group()
    except Exception as problem:  # whatever it was, the parent must hear of it rather than wait
        answers.put(f"rank {rank}: {type(problem).__name__}: {problem}")


def _communicators(ranks: int, device: torch.device) -> tuple[MemoryPoint, ...]:
    """Memory that the first all-reduce of the first communicator takes, and that of a second one."""
    if device.type != "cuda":
        return ()
    small = torch.ones(1 << 18, device=device)
    taken = []
    for group in (dist.group.WORLD, dist.new_group(list(range(ranks)))):
        torch.cuda.synchronize(device)
        before, _ = torch.cuda.mem_get_info(device)
        dist.all_reduce(small, group=group)
        torch.cuda.synchronize(device)
        after, _ = torch.cuda.mem_get_info(device)
        taken.append(before - after)
    return (
        MemoryPoint(what="communicator", size_bytes=taken[0]),
        MemoryPoint(what="next_communicator", size_bytes=taken[1]),
    )


def _points(
    rank: int, ranks: int, device: torch.device, sizes: tuple[int, ...], budget_s: float
) -> tuple[CollectivePoint, ...]:
    each_s = budget_s / (len(OPS) * len(sizes))
    found = []
    for size in sizes:
        whole = torch.randn(size // 2 // ranks * ranks, device=device, dtype=torch.bfloat16)
        for op in OPS:
            dist.barrier()
            call, repeats = _call(op, whole, rank, ranks), max(2, min(20, (64 << 20) // size))
            timing = _agreed(call, repeats, device, each_s)
            found.append(CollectivePoint(op=op, ranks=ranks, size_bytes=whole.nbytes, seconds=timing[0], spread=timing[1]))
    return tuple(found)


def _agreed(call: Call, repeats: int, device: torch.device, budget_s: float) -> tuple[float, float]:
    """The slowest rank's figure. Every rank must repeat as often, so the repetitions are set here, not by each one's clock."""
    for _ in range(WARM_UPS):
        call()
    timing = time_calls([call] * repeats, device, budget_s, capture=False, repetitions=REPETITIONS)
    both = torch.tensor([timing.seconds, timing.spread], device=device, dtype=torch.float64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both[0]), float(both[1])


def _call(op: CollectiveOp, whole: torch.Tensor, rank: int, ranks: int) -> Call:
    part = whole.view(ranks, -1)[rank].clone()
    other = torch.empty_like(whole)
    calls: dict[CollectiveOp, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, op=dist.ReduceOp.MAX),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "p2p": lambda: _send(whole, rank),
    }
    return calls[op]


def _send(whole: torch.Tensor, rank: int) -> None:
    """From the first rank to the second; the others look on."""
    if rank < 2:
        send = dist.P2POp(dist.isend, whole, 1) if rank == 0 else dist.P2POp(dist.irecv, whole, 0)
        for request in dist.batch_isend_irecv([send]):  # batched, so that it runs in the group's own communicator
            request.wait()
