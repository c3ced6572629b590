from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.engine import EngineError, WeightBucket
from miles_plan.backends.weight_transport.shared_memory import (
    BucketPlan,
    SharedMemoryWriter,
    plan_buckets,
    read_bucket,
    remove_stale_segments,
)

TENSORS = [
    ("a", torch.arange(6, dtype=torch.float32).view(2, 3)),
    ("b", torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()),
    ("c", torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).T),
]
PLAN = BucketPlan(0, 0, ("a", "b", "c"), last=True)


def write(directory: Path) -> tuple[SharedMemoryWriter, WeightBucket]:
    writer = SharedMemoryWriter(directory)
    return writer, writer.write(3, PLAN, TENSORS)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    writer, bucket = write(tmp_path)
    for (name, tensor), (read_name, read) in zip(TENSORS, read_bucket(bucket), strict=True):
        assert read_name == name
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    held = dict(read_bucket(bucket))
    writer.release(3)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(held["a"], TENSORS[0][1]), "a reader keeps what it has open"


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    writer, bucket = write(tmp_path)
    with open(bucket.handle, "r+b") as file:
        file.seek(bucket.tensors[1].offset_bytes)
        byte = file.read(1)
        file.seek(bucket.tensors[1].offset_bytes)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(EngineError, match="weight 'b' of version 3 does not match its checksum"):
        list(read_bucket(bucket))
    writer.close()


def test_a_segment_that_is_gone_is_named(tmp_path: Path) -> None:
    writer, bucket = write(tmp_path)
    writer.close()
    with pytest.raises(EngineError, match="cannot open the weight segment"):
        list(read_bucket(bucket))
    with pytest.raises(EngineError, match="travels by 'nccl'"):
        list(read_bucket(replace(bucket, transport="nccl")))


def test_segments_vanish_with_their_writer(tmp_path: Path) -> None:
    writer, _ = write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writers_segments_are_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from miles_plan.backends.weight_transport.shared_memory import BucketPlan, SharedMemoryWriter\n"
        "writer = SharedMemoryWriter(Path(sys.argv[1]))\n"
        "writer.write(1, BucketPlan(0, 0, ('a',), True), [('a', torch.ones(3))])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    writer, bucket = write(tmp_path)
    old = time.time() - 3600
    for path in (left, Path(bucket.handle)):
        os.utime(path, (old, old))
    assert remove_stale_segments(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [Path(bucket.handle)], "a living writer's segment stays"
    writer.close()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    writer = SharedMemoryWriter(tmp_path / "missing")
    with pytest.raises(EngineError, match=r"cannot create the weight segment .*missing"):
        writer.write(0, PLAN, TENSORS)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 600))
def test_buckets_cover_every_tensor_once_in_one_order(tensors: list[tuple[int, int]], bucket_bytes: int) -> None:
    sizes = {f"t{number}": size for number, (size, _) in enumerate(tensors)}
    owners = {f"t{number}": owner for number, (_, owner) in enumerate(tensors)}
    plans = plan_buckets(sizes, owners, bucket_bytes)
    names = [name for plan in plans for name in plan.names]
    assert sorted(names) == sorted(sizes)
    assert names == sorted(sizes, key=lambda name: (owners[name], int(name[1:])))
    assert [plan.index for plan in plans] == list(range(len(plans)))
    assert [plan.last for plan in plans] == [False] * (len(plans) - 1) + [True]
    for plan in plans:
        assert {owners[name] for name in plan.names} == {plan.owner}
        assert len(plan.names) == 1 or sum(sizes[name] for name in plan.names) <= bucket_bytes
