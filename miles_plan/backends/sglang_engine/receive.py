"""Runs inside SGLang's schedulers: takes one bucket of weights, checks its bytes, places them, and looks whether they arrived.

SGLang calls `take_bucket(model, [(description, tensor)])` on every rank, as the `custom_weight_loader` that its arguments
name. The description is JSON (see `description_of`). The verdict goes into a file a rank: an exception here would end the
scheduler, and what is wrong should be said by name first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket, WeightTensor
from miles_plan.backends.sglang_engine.placed_weights import unlike
from miles_plan.backends.weight_transport.cuda_ipc import checksums, view_of

CUDA_IPC, SHARED_MEMORY, NONE = "cuda_ipc", "shared_memory", "none"


def description_of(bucket: WeightBucket, *, verdicts: str, payload: str, probes: Sequence[dict[str, Any]] = ()) -> str:
    """What a scheduler needs to take a bucket.

    verdicts: path prefix of the files that ranks answer in; payload: where the bytes are: in the tensor that comes along, in
    the shared memory that the bucket's handle names, or nowhere, where only probes are to be looked at.
    """
    return json.dumps(
        {
            "payload": payload,
            "handle": bucket.handle if payload == SHARED_MEMORY else "",
            "transport": bucket.transport,
            "version": bucket.version,
            "index": bucket.index,
            "last": bucket.last,
            "tensors": [asdict(tensor) for tensor in bucket.tensors],
            "probes": list(probes),
            "verdicts": verdicts,
        }
    )


def take_bucket(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Take one bucket; leaves `<verdicts>.<rank>` with an empty list, or with what is wrong."""
    (text, data) = named_tensors[0]
    described = json.loads(text)
    try:
        found = list(_take(model, described, data))
    except Exception as error:  # whatever it is, the engine's owner must hear of it
        found = [f"{type(error).__name__}: {error}"]
    path = Path(f"{described['verdicts']}.{_rank()}")
    aside = path.with_suffix(f"{path.suffix}.aside")
    aside.write_text(json.dumps(found), encoding="utf-8")
    os.replace(aside, path)


def _take(model: Any, described: dict[str, Any], data: Tensor) -> Iterator[str]:
    """Place the bucket's tensors; yields what does not match."""
    tensors = [WeightTensor(**{**each, "shape": tuple(each["shape"])}) for each in described["tensors"]]
    if described["payload"] == CUDA_IPC:
        wrong = [
            tensor.name
            for tensor, found in zip(tensors, checksums(data, tensors), strict=True)
            if tensor.checksum and found != tensor.checksum
        ]
        if wrong:
            yield f"{len(wrong)} tensors do not match their checksums, the first is {wrong[0]}"
            return
        model.load_weights([(tensor.name, view_of(data, tensor)) for tensor in tensors])
    elif described["payload"] == SHARED_MEMORY:
        model.load_weights(_from_shared_memory(described, tensors, data.device))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the lender reuses the bucket as soon as this call is over
    yield from unlike(model, described["probes"])


def _from_shared_memory(described: dict[str, Any], tensors: Sequence[WeightTensor], device: torch.device) -> Iterator[Any]:
    from miles_plan.backends.weight_transport.shared_memory import read_bucket

    bucket = WeightBucket(
        transport=described["transport"],
        version=described["version"],
        index=described["index"],
        handle=described["handle"],
        tensors=tuple(tensors),
        last=described["last"],
    )
    for name, tensor in read_bucket(bucket):
        yield name, tensor.to(device)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def verdicts_of(prefix: str, ranks: int) -> list[str]:
    """What the ranks answered; EngineError where one did not. The files are gone then."""
    found = []
    for rank in range(ranks):
        path = Path(f"{prefix}.{rank}")
        try:
            found += [f"rank {rank}: {each}" for each in json.loads(path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            raise EngineError(f"sglang: rank {rank} has not said whether it took the weights") from None
        path.unlink()
    return found
