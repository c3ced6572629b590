"""What NCCL's communicators add to a GPU's memory, one after another: the planner's `communicator_bytes`, measured.

    python -m benchmarks.engines.communicator_memory OUT.json [--gpus 4]

One process a GPU, nothing else on it. Groups are those of Megatron-core's trainer with tensor and pipeline parallelism: all
ranks, pairs of neighbours, pairs across stages that send and receive, all ranks again, pairs again, each rank alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

MESSAGE_ELEMENTS = 16 << 20
MIB = 1 << 20


def steps(world: int) -> list[tuple[str, list[list[int]]]]:
    """What is used first, in this order, and by which ranks together."""
    ranks = list(range(world))
    neighbours = [ranks[at : at + 2] for at in range(0, world, 2)]
    across = [[at, at + world // 2] for at in range(world // 2)]
    named = [("all", [ranks]), ("neighbours", neighbours), ("send and receive", across), ("all again", [ranks])]
    return [*named, ("across again", across), ("alone", [[rank] for rank in ranks])]


def measure(rank: int, world: int, folder: str) -> None:
    """One rank: device memory after each step, in MiB above the context, into a file of its own."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    torch.cuda.set_device(rank)
    before = torch.cuda.mem_get_info()[0]
    message = torch.ones(MESSAGE_ELEMENTS, device="cuda")
    found: dict[str, float] = {}
    last = torch.cuda.mem_get_info()[0]
    found["context and message"] = (before - last) / MIB
    dist.init_process_group("nccl", rank=rank, world_size=world)
    for name, ranks in steps(world):
        groups = [dist.new_group(each) for each in ranks]
        own = next(at for at, each in enumerate(ranks) if rank in each)
        if name == "send and receive":
            low, high = ranks[own]
            if rank == low:
                dist.send(message, high, group=groups[own])
                dist.recv(message, high, group=groups[own])
            else:
                dist.recv(message, low, group=groups[own])
                dist.send(message, low, group=groups[own])
        else:
            dist.all_reduce(message, group=groups[own])
        torch.cuda.synchronize()
        left = torch.cuda.mem_get_info()[0]
        found[name], last = (last - left) / MIB, left
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main() -> int:
    """Measure, print, write."""
    import tempfile

    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, args=(asked.gpus, folder), nprocs=asked.gpus)
        ranks: list[dict[str, Any]] = [
            json.loads(Path(folder, f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(asked.gpus)
        ]
    for name in ranks[0]:
        print(f"{name:<22} {'  '.join(f'{each[name]:7.0f}' for each in ranks)} MiB")
    settings = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    found = {"machine": machine(), "gpus": asked.gpus, "environment": settings, "ranks_mib": ranks}
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
