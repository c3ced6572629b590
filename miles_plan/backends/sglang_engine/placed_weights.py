"""Where single elements of a Hugging Face tensor lie in SGLang's model, to look whether a sync reached its parameters.

SGLang fuses query, key and value, and gate and up, and splits tensors over its tensor parallel ranks; the fused parameter keeps
its parts one below the other, each rank its own share of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_GATE_UP = {"gate_proj": 0, "up_proj": 1}
_EXPERT = re.compile(r"\.experts\.\d+\.")


def can_probe(name: str) -> bool:
    """Whether this module knows where elements of a tensor lie. Experts are left to the checksums: their order is SGLang's."""
    return name.endswith(".weight") and not _EXPERT.search(name)


def unlike(model: Any, probes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Probes whose parameter does not hold the value. A probe: name, full shape, row, column, value.

    Elements that another rank holds are passed over there.
    """
    parameters = dict(model.named_parameters())
    for probe in probes:
        found = _element(model, parameters, probe)
        if found is not None and found != probe["value"]:
            place = f"{probe['name']}[{probe['row']}, {probe['column']}]"
            yield f"{place} is {found!r} after the sync, the trainer has {probe['value']!r}"


def _element(model: Any, parameters: dict[str, Tensor], probe: dict[str, Any]) -> float | None:
    """The value at the probe's place, None where this rank does not hold it."""
    name, row, column = probe["name"], probe["row"], probe["column"]
    rows = probe["shape"][0]
    columns = probe["shape"][1] if len(probe["shape"]) > 1 else 1
    part = name.rsplit(".", 2)[-2]
    module = _module(model, name)
    if part in _QKV:
        fused = _module(model, name.replace(part, "qkv_proj"))
        head = fused.head_size
        heads = (fused.num_heads, fused.num_kv_heads, fused.num_kv_heads)
        sizes = [count * head for count in heads]
        rank = fused.tp_rank if part == "q_proj" else fused.tp_rank // fused.num_kv_head_replicas
        return _at(fused.weight, row - rank * sizes[_QKV[part]], sum(sizes[: _QKV[part]]), sizes[_QKV[part]], column)
    if part in _GATE_UP and module is None:
        fused = _module(model, name.replace(part, "gate_up_proj"))
        size = rows // fused.tp_size
        return _at(fused.weight, row - fused.tp_rank * size, _GATE_UP[part] * size, size, column)
    weight = parameters.get(name)
    if weight is None:
        return None
    own_rows, own_columns = weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1
    rank = int(getattr(module, "tp_rank", 0) or 0)
    if weight.dim() > 1 and own_columns < columns:  # split along its input
        column -= rank * own_columns
    elif hasattr(module, "shard_indices"):  # an embedding, whose last shard is padded
        row -= module.shard_indices.org_vocab_start_index
        own_rows = module.shard_indices.org_vocab_end_index - module.shard_indices.org_vocab_start_index
    if not (0 <= row < own_rows and 0 <= column < own_columns):
        return None
    return float(weight[row, column] if weight.dim() > 1 else weight[row])


def _at(weight: Tensor, row: int, first: int, count: int, column: int) -> float | None:
    """The element `row` of a part of `count` rows that begins at `first`; None outside of it."""
    return float(weight[first + row, column]) if 0 <= row < count else None


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def probes_of(name: str, tensor: Tensor, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """`count` elements of a full tensor at drawn places, with their values."""
    flat = torch.randint(tensor.numel(), (count,), generator=generator)
    columns = tensor.shape[1] if tensor.dim() > 1 else 1
    values = tensor.reshape(-1)[flat.to(tensor.device)].float().tolist()
    return [
        {"name": name, "shape": list(tensor.shape), "row": at // columns, "column": at % columns, "value": value}
        for at, value in zip(flat.tolist(), values, strict=True)
    ]
