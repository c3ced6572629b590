"""A bucket in a trainer's GPU memory, opened by an engine in another process on the same GPU (CUDA IPC).

torch names a GPU by its index, which differs between processes that see different GPUs; here it is named by its UUID.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket

TRANSPORT = "cuda_ipc"
_DEVICE = 6  # place of the device index among the arguments of torch's rebuild_cuda_tensor


def gpu_uuid(index: int | None = None) -> str:
    """The UUID of a GPU of this process, the current one by default."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).uuid)


def export_flat(flat: Tensor) -> str:
    """A handle on a flat tensor: valid while this process keeps it. The receiver sees writes made afterwards, too."""
    from torch.multiprocessing.reductions import reduce_tensor

    reduce: Any = reduce_tensor  # without annotations
    _, arguments = reduce(flat)
    named = (*arguments[:_DEVICE], gpu_uuid(flat.device.index), *arguments[_DEVICE + 1 :])
    return base64.b64encode(pickle.dumps(named)).decode()


def join_handles(handles: Mapping[str, str]) -> str:
    """One bucket's handle from the handles of all GPUs that hold a copy, by UUID."""
    return json.dumps(dict(handles))


def open_bucket(bucket: WeightBucket) -> Tensor:
    """The bucket's bytes, uint8, on this process's GPU. EngineError when no trainer rank shares the GPU."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    if bucket.transport != TRANSPORT:
        raise EngineError(f"bucket {bucket.index} travels by '{bucket.transport}', it cannot be opened by '{TRANSPORT}'")
    handles = json.loads(bucket.handle)
    own = gpu_uuid()
    if own not in handles:
        raise EngineError(f"bucket {bucket.index} lies on the GPUs {sorted(handles)}, this engine runs on {own}")
    arguments = pickle.loads(base64.b64decode(handles[own]))
    rebuild: Any = rebuild_cuda_tensor  # without annotations
    flat: Tensor = rebuild(*arguments[:_DEVICE], torch.cuda.current_device(), *arguments[_DEVICE + 1 :])
    return flat
