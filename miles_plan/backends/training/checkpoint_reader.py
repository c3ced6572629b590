"""Tensors of a Hugging Face checkpoint, opened one at a time so that a rank reads only its slices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def open_tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    """Each tensor with its safetensors slice (`source[2:4]` reads), file by file, its shape checked.

    ValueError names a tensor that is missing or has another shape; FileNotFoundError names a missing file.
    """
    from safetensors import safe_open

    files = _files_by_tensor(directory)
    if missing := sorted(set(shapes) - set(files)):
        raise ValueError(f"{directory} lacks {len(missing)} tensors that the model needs, such as '{missing[0]}'")
    for file in sorted({files[name] for name in shapes}):
        with safe_open(directory / file, framework="pt") as opened:
            for name in (name for name in shapes if files[name] == file):
                source = opened.get_slice(name)
                if tuple(source.get_shape()) != shapes[name]:
                    wanted = f"config.json asks for {list(shapes[name])}"
                    raise ValueError(f"{directory / file}: '{name}' has shape {source.get_shape()}, {wanted}")
                yield name, source


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint. FileNotFoundError names a missing file."""
    from safetensors import safe_open

    found = {}
    for file in sorted(set(_files_by_tensor(directory).values())):
        with safe_open(directory / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def _files_by_tensor(directory: Path) -> dict[str, str]:
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return dict(json.loads(index.read_text())["weight_map"])
    single = directory / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"neither model.safetensors nor its index in {directory}")
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single.name)
