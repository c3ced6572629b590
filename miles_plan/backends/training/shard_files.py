"""Tensors in safetensors files: a rank's shard of a checkpoint, and whole models in Hugging Face's layout.

A file is written beside its name and renamed when it is on disk, so a name that exists is a file that is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miles_plan.backends.engine import EngineError

MAX_SHARD_BYTES = 5 * 10**9  # transformers' default


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file durably. EngineError names the path and the bytes needed when the disk refuses."""
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        _commit(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise EngineError(f"cannot write {path} ({size_bytes} bytes): {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file durably, under the same rules."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _commit(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EngineError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path, expected: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, which must be exactly the expected names, shapes and dtypes, under the expected metadata.

    EngineError names the file and the first thing that does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no mapping
    except (OSError, SafetensorError) as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    for key, value in metadata.items():
        if found.get(key) != value:
            raise EngineError(f"{path} was written with {key} '{found.get(key)}', this engine has '{value}'")
    if missing := sorted(expected.keys() ^ tensors.keys()):
        raise EngineError(f"{path} holds other tensors than this engine: '{missing[0]}' is only on one side")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise EngineError(
                f"{path}: '{name}' is {tensors[name].dtype} {list(tensors[name].shape)}, "
                f"this engine has {tensor.dtype} {list(tensor.shape)}"
            )
    return tensors


def write_model(directory: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Full tensors by Hugging Face name as `save_pretrained` lays them out: one file, or numbered shards with an index.

    Holds one shard in memory at a time. Returns the file names, the index last.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        path = directory / f".part-{len(shards) + 1:05d}.safetensors"
        write_tensors(path, pending, {"format": "pt"})
        shards.append((path, list(pending)))

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending, pending_bytes = {}, 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    return _name_shards(directory, shards, total_bytes)


def _name_shards(directory: Path, shards: list[tuple[Path, list[str]]], total_bytes: int) -> list[str]:
    """The number of shards is in every shard's name, so names come last."""
    if len(shards) == 1:
        os.replace(shards[0][0], directory / "model.safetensors")
        return ["model.safetensors"]
    files, weight_map = [], {}
    for number, (path, names) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(path, directory / file)
        files.append(file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return [*files, "model.safetensors.index.json"]


def _commit(temporary: Path, path: Path) -> None:
    """Bytes on disk, then the name, then the name on disk."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
