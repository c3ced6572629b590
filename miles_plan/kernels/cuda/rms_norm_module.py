"""An RMSNorm module on `rms_norm`, in the two shapes that training frameworks build."""

from __future__ import annotations

from typing import Any

import torch

from .rms_norm import rms_norm


class RmsNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on the batch-invariant kernel, with the constructor that Megatron-core's layer specs call.

    config: anything with `params_dtype`, `sequence_parallel` and `layernorm_zero_centered_gamma`. Same parameters and state
    dict as torch.nn.RMSNorm, so an existing module may be turned into this one by its class.
    Raises ValueError for an RMSNorm whose weight is stored less one.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        if getattr(config, "layernorm_zero_centered_gamma", False):
            raise ValueError("config.layernorm_zero_centered_gamma is set; allowed: weights that multiply as they are")
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Megatron adds the gradients of such weights over the ranks that tokens are split between.
        self.weight.sequence_parallel = getattr(config, "sequence_parallel", False)  # type: ignore[attr-defined]  # Megatron's mark on a parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y = rms_norm(x, self.weight, eps)
        assert isinstance(y, torch.Tensor)
        return y
