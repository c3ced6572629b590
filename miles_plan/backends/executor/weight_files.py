"""Published weights kept beyond the trainer that published them: each bucket's bytes as a file, their description as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from miles_plan.backends.engine import WeightBucket, WeightTensor
from miles_plan.backends.executor.durable_files import naming, write_json

DESCRIPTION = "buckets.json"


def save_buckets(folder: Path, buckets: Sequence[WeightBucket]) -> list[str]:
    """Copy the buckets' segments into a new folder; returns the file names. OSError names the path."""
    with naming(folder):
        folder.mkdir(parents=True)
    names = [f"bucket-{bucket.index:05d}.bin" for bucket in buckets]
    for name, bucket in zip(names, buckets, strict=True):
        with naming(folder / name):
            shutil.copyfile(bucket.handle, folder / name)
    described = [asdict(replace(bucket, handle=name)) for name, bucket in zip(names, buckets, strict=True)]
    write_json(folder / DESCRIPTION, described)
    return [*names, DESCRIPTION]


def load_buckets(folder: Path) -> list[WeightBucket]:
    """Buckets whose handles are files of the folder; whoever takes them checks every tensor's checksum."""
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    return [
        WeightBucket(
            **{
                **each,
                "handle": str(folder / each["handle"]),
                "tensors": tuple(WeightTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in each["tensors"]),
            }
        )
        for each in described
    ]
