"""Full Hugging Face tensors out of shards: all ranks gather one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from miles_plan.backends.fsdp_engine.model import ShardedModel
from miles_plan.backends.weight_transport.publisher import FullTensor


def full_tensors(model: ShardedModel, dtype: torch.dtype) -> dict[str, FullTensor]:
    """Every tensor of the model's checkpoint, in the order of its parameters, in the dtype it is handed out in."""
    return {part.name: FullTensor(part.shape, dtype) for parts in model.parts.values() for part in parts}


def fill_full(views: Mapping[str, Tensor], model: ShardedModel) -> None:
    """Fill the views on every rank; collective. A parameter of many experts is gathered once for all that are asked for."""
    parameters = model.parameters
    with torch.no_grad():
        for name, parts in model.parts.items():
            wanted = [part for part in parts if part.name in views]
            if not wanted:
                continue
            dtype = views[wanted[0].name].dtype
            full = parameters[name].detach().to(dtype).full_tensor()  # rounded before it travels
            for part in wanted:
                views[part.name].copy_(part.of(full))
