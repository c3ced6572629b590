"""A trainer and a receiver of SGLang's kind meet in a group and a bucket goes across; over gloo, which needs no GPU.

The receiver does what SGLang 0.5.16 does in `init_custom_process_group` and `_update_bucketed_weights_from_distributed`.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_plan.backends.engine import WeightTensor
from miles_plan.backends.weight_transport.cuda_ipc import packed
from miles_plan.backends.weight_transport.nccl_group import join_as_sender

SHAPES = {"a.weight": (3, 5), "b.weight": (7,)}


def described() -> list[WeightTensor]:
    """Two bf16 tensors of 30 and 14 bytes, each at a multiple of 64 as a trainer lays them out."""
    found = []
    for index, (name, shape) in enumerate(SHAPES.items()):
        size = 2 * torch.Size(shape).numel()
        found.append(
            WeightTensor(name=name, shape=shape, dtype="bfloat16", offset_bytes=64 * index, size_bytes=size, checksum="")
        )
    return found


def bucket() -> torch.Tensor:
    data = torch.full((128,), 255, dtype=torch.uint8)
    for number, each in enumerate(described()):
        values = torch.arange(torch.Size(each.shape).numel(), dtype=torch.bfloat16) + 100 * number
        data[each.offset_bytes : each.offset_bytes + each.size_bytes] = values.view(torch.uint8)
    return data


def receive(rank: int, port: int, world_size: int, name: str, answers: Any) -> None:
    """One of SGLang's ranks; it has a world of its own first."""
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world, rendezvous

    with socket.create_server(("127.0.0.1", 0)) as server:
        own = server.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{own}", rank=0, world_size=1)
    store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=dist.default_pg_timeout))
    store = PrefixStore(name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend("gloo"), store, group_name=name, backend_options=None, timeout=dist.default_pg_timeout
    )
    _world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    named = {each: torch.empty(shape, dtype=torch.bfloat16) for each, shape in SHAPES.items()}
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in named.values()])
    dist.broadcast(flat, src=0, group=group)
    found, at = {}, 0
    for each, tensor in named.items():
        size = tensor.numel() * 2
        found[each] = flat[at : at + size].view(torch.bfloat16).reshape(tensor.shape).tolist()
        at += size
    answers.put((rank, found))
    os._exit(0)  # gloo's threads may still be waiting when Python ends, which would abort the process


@pytest.mark.parametrize("receivers", [1, 2])
def test_a_bucket_reaches_every_receiver_as_sglang_reads_it(receivers: int) -> None:
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    name = f"miles-plan-rollout-{receivers}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        context.Process(target=receive, args=(rank, port, 1 + receivers, name, answers)) for rank in range(1, 1 + receivers)
    ]
    for process in processes:
        process.start()
    group = join_as_sender("127.0.0.1", port, world_size=1 + receivers, name=name, timeout_s=60.0, backend="gloo")
    dist.broadcast(packed(bucket(), described()), src=0, group=group)
    expected = {
        each: (torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16) + 100 * number).reshape(shape).tolist()
        for number, (each, shape) in enumerate(SHAPES.items())
    }
    received = dict(answers.get() for _ in processes)
    assert received == dict.fromkeys(range(1, 1 + receivers), expected)
    for process in processes:
        process.join(30.0)
        assert process.exitcode == 0
