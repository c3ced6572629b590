"""The experts of a mixture between the tokens' dispatch and their combination: two grouped products with SwiGLU between them."""

from __future__ import annotations

import torch

from .grouped_matmul import grouped_matmul
from .swiglu import swiglu


def swiglu_experts(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each row through its expert, [rows, H] to [rows, H]; rows sorted by expert.

    up: [experts, 2 I, H], an expert's gate above its up projection. down: [experts, H, I]. counts: int32 [experts].
    Order of the sums, dtypes and errors: as `grouped_matmul` and `swiglu`. Differentiable.
    """
    return grouped_matmul(swiglu(grouped_matmul(rows, up, counts)), down, counts)
