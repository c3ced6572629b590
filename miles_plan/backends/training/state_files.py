"""A trainer rank's state in torch.distributed.checkpoint's format, restored bit for bit; a file that does not fit is named.

Beside torch's files lies one JSON file a rank: what the state belongs to, and the size of every file, so that a file that was
cut short is found before anything is overwritten.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.shard_files import write_text
from miles_plan.backends.training.state_pieces import THREADS, PiecewisePlanner, ThreadedReader

_METADATA = ".metadata"


def write_state(directory: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, str], *, rank: int) -> list[str]:
    """Write this rank's tensors; collective. Returns this rank's file names. EngineError when the disk refuses."""
    dcp = _torch_checkpoint()
    state = {f"rank_{rank:05d}/{name}": tensor.detach() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), _no_checksums_in_archives():
            warnings.simplefilter("ignore")  # that no process group is a problem: one rank needs none
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(directory, thread_count=THREADS),
                planner=PiecewisePlanner(),
                no_dist=not dist.is_initialized(),
            )
    except (OSError, dcp.api.CheckpointException) as error:
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        raise EngineError(f"cannot write {size_bytes} bytes of trainer state below {directory}: {error}") from error
    files = sorted(path.name for path in directory.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        files.append(_METADATA)
    sizes = {name: (directory / name).stat().st_size for name in files}
    write_text(directory / _manifest(rank), json.dumps({"identity": dict(identity), "size_bytes": sizes}, indent=2) + "\n")
    return [*files, _manifest(rank)]


def check_state(directory: Path, identity: Mapping[str, str], *, rank: int) -> None:
    """EngineError names the first file of this rank that is missing, cut short, or of another model or layout."""
    path = directory / _manifest(rank)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes, found = dict(manifest["size_bytes"]), dict(manifest["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    for name, size in sizes.items():
        actual = (directory / name).stat().st_size if (directory / name).is_file() else None
        if actual != size:
            raise EngineError(f"{directory / name} has {actual} bytes, {size} were written")
    for key, value in identity.items():
        if found.get(key) != value:
            raise EngineError(f"{path} was written with {key} '{found.get(key)}', this engine has '{value}'")


def read_state(directory: Path, *, rank: int) -> dict[str, Tensor]:
    """This rank's tensors, on the host; collective. EngineError when torch cannot read them."""
    dcp = _torch_checkpoint()
    prefix = f"rank_{rank:05d}/"
    reader = ThreadedReader(directory)
    try:
        found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in found.items() if name.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
        raise EngineError(f"cannot read the trainer state below {directory}: {error}") from error
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


@contextmanager
def _no_checksums_in_archives() -> Iterator[None]:
    """Inside, torch.save leaves its CRC-32s out: computing them holds the interpreter's lock, and every file gets a SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _torch_checkpoint() -> Any:
    """torch.distributed.checkpoint, whose exports its stubs do not declare."""
    return importlib.import_module("torch.distributed.checkpoint")


def _manifest(rank: int) -> str:
    return f"rank_{rank:05d}.json"
