"""Whether a model folder's weights are those that its config.json describes: read from headers, before anything starts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.tensors import weight_tensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEADER_LIMIT_BYTES = 100 << 20  # safetensors' own


def mismatches(architecture: ModelArchitecture, folder: Path) -> Iterator[str]:
    """What of the folder's tensors is missing, or of another shape than the architecture's; nothing where all fits.

    Tensors that the architecture counts without naming them (norms, biases) are left to the engines.
    """
    try:
        shapes = tensor_shapes(folder)
    except (OSError, ValueError) as problem:
        yield str(problem)
        return
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found.setdefault(re.sub(r"\.\d+(?=\.)", ".{}", name), Counter())[shape] += 1
    for wanted in weight_tensors(architecture):
        if not _compared(wanted.pattern):
            continue
        have = found.get(wanted.pattern, Counter())
        if other := {shape: count for shape, count in have.items() if shape != wanted.shape}:
            shape = next(iter(other))
            yield f"{wanted.pattern} is {list(shape)} in the files, config.json makes it {list(wanted.shape)}"
        elif have[wanted.shape] != wanted.count:
            yield f"{wanted.pattern}: {have[wanted.shape]} tensors in the files, config.json has {wanted.count}"


def _compared(pattern: str) -> bool:
    """Whether checkpoints name the tensor so: projections do not vary, what a pattern lumps together is in no file."""
    return pattern.endswith("_proj.weight") or pattern in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.{}.mlp.gate.weight",
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files. OSError or ValueError name a file that is missing or torn."""
    files = [SINGLE]
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(listed.get("weight_map", {}).values()))
    elif not (folder / SINGLE).is_file():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        for tensor, fields in _header(folder / name).items():
            if tensor != "__metadata__":
                shapes[tensor] = tuple(int(size) for size in fields["shape"])
    return shapes


def _header(path: Path) -> Mapping[str, Any]:
    """A file's header: eight bytes of length, little endian, then JSON. The file must be as long as its tensors say."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _HEADER_LIMIT_BYTES:
            raise ValueError(f"{path}: no safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"{path}: its header is torn") from None
    ends = max((fields["data_offsets"][1] for name, fields in header.items() if name != "__metadata__"), default=0)
    if path.stat().st_size != 8 + size + ends:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, its header speaks of {8 + size + ends}; the file is not whole")
    return header
