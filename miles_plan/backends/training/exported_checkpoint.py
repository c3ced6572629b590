"""A Hugging Face checkpoint directory that appears when it is whole, and the digest of a tensor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.shard_files import write_model, write_text


def make_aside(directory: Path) -> Path:
    """A temporary directory beside `directory`. EngineError names a path that exists already or cannot be written."""
    if directory.exists():
        raise EngineError(f"cannot write the checkpoint {directory}: it exists already")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    except OSError as error:
        raise EngineError(f"cannot write the checkpoint {directory}: {error}") from error


def write_aside(aside: Path, directory: Path, source: Path, tensors: Iterator[tuple[str, Tensor]], dtype: str) -> list[str]:
    """Write full tensors, with the config and tokenizer files of `source`, into `aside`, then give it its name.

    Runs `tensors` to its end even when the disk refuses: ranks that send some must not wait. Returns the file names.
    """
    try:
        files = write_model(aside, tensors)
        files += _copy_companions(source, aside, dtype)
        os.rename(aside, directory)
    except OSError as error:
        raise EngineError(f"cannot write the checkpoint {directory}: {error}") from error
    finally:
        for _ in tensors:  # what was not written
            pass
        shutil.rmtree(aside, ignore_errors=True)
    return files


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's bytes."""
    copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # a storage seen by NumPy cannot be offloaded
    return hashlib.sha256(copied.reshape(-1).view(torch.uint8).numpy().data).digest()


def digest_of_model(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, digests: Mapping[str, bytes]) -> str:
    """SHA-256 over a model: of each tensor's name, dtype, shape and digest, in the order of `shapes`."""
    total = hashlib.sha256()
    for name, shape in shapes.items():
        total.update(f"{name} {dtype} {list(shape)}\n".encode())
        total.update(digests[name])
    return total.hexdigest()


def _copy_companions(source: Path, target: Path, dtype: str) -> list[str]:
    """config.json with the dtype of these weights, and whatever else lies beside the source's weights (tokenizer, template)."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_text(target / "config.json", json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    copied = ["config.json"]
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json" and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    return copied
