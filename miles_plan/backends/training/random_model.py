"""Random weights of a large model as a Hugging Face checkpoint: made and written in pieces, on all cores.

Building the transformers class and saving it keeps one core busy: it draws 100 million parameters a second and writes as many
(3 billion parameters of a mixture of experts: 70 s). Here every piece has a generator of its own and goes straight to its place
in a file, so pieces can be made in any order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

PIECE_ELEMENTS = 4 << 20
SHARD_BYTES = 1 << 29  # small, because the kernel lets one thread write to a file and loaders read one file a thread
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements `index * PIECE_ELEMENTS` and following of a tensor, and where they stand in a file."""

    tensor: str
    index: int
    elements: int
    file: Path
    offset: int


def write_random_weights(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, std: float, seed: int
) -> list[str]:
    """Safetensors shards and their index: norms 1, biases 0, all else normal with mean 0, as transformers initialises decoders.

    The bits follow from seed, names, shapes and dtype, for any number of cores. Returns the file names, the index last.
    """
    files = list(_shards(shapes, dtype.itemsize))
    pieces: list[_Piece] = []
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, held in zip(names, files, strict=True):
        pieces += _open_shard(directory / name, held, dtype)
    by_shard = sorted(pieces, key=lambda piece: (piece.offset, piece.file))  # neighbours in the queue are of different files
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda piece: _write(piece, dtype, std, seed), by_shard))
    total_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    weight_map = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, "model.safetensors.index.json"]


def _shards(shapes: Mapping[str, tuple[int, ...]], item_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors by file, in order; a tensor larger than a shard has one of its own."""
    held: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * item_bytes
        if held and size + tensor_bytes > SHARD_BYTES:
            yield held
            held, size = {}, 0
        held[name] = shape
        size += tensor_bytes
    yield held


def _open_shard(path: Path, held: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[_Piece]:
    """Write a file's header and give it its length; returns what remains to be written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, start = {}, 0
    for name, shape in held.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        starts[name], start = start, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return [
        _Piece(
            name,
            index,
            min(PIECE_ELEMENTS, math.prod(shape) - first),
            path,
            8 + len(text) + starts[name] + first * dtype.itemsize,
        )
        for name, shape in held.items()
        for index, first in enumerate(range(0, math.prod(shape), PIECE_ELEMENTS))
    ]


def _write(piece: _Piece, dtype: torch.dtype, std: float, seed: int) -> None:
    values = _values(piece, std, seed).to(dtype).view(torch.uint8).numpy()
    descriptor = os.open(piece.file, os.O_WRONLY)
    try:
        written = os.pwrite(descriptor, values.data, piece.offset)
    finally:
        os.close(descriptor)
    if written != values.nbytes:
        raise OSError(f"{piece.file}: {written} of {values.nbytes} bytes were written")


def _values(piece: _Piece, std: float, seed: int) -> torch.Tensor:
    """float32 [elements]."""
    if piece.tensor.endswith("norm.weight"):
        return torch.ones(piece.elements)
    if piece.tensor.endswith(".bias"):
        return torch.zeros(piece.elements)
    key = hashlib.sha256(f"{seed}/{piece.tensor}/{piece.index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(piece.elements).normal_(0.0, std, generator=generator)
