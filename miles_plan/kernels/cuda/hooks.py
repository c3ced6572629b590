"""Where Megatron-core and SGLang take the kernels in.

Matrix products of both go through aten, so `enable.enable_aten` covers them, forward and backward, once it is entered in each
worker. What is left is the norm and attention modules that Megatron-core's layer specs name, and SGLang's norm layers.
Neither package is imported here: a spec and a model are passed in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .attention import attention
from .rms_norm import rms_norm

NORM_SLOTS = ("input_layernorm", "pre_mlp_layernorm", "pre_cross_attn_layernorm", "q_layernorm", "k_layernorm")


class RmsNorm(torch.nn.Module):
    """An RMSNorm with the constructor that Megatron-core's layer specs call."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        dtype = getattr(config, "params_dtype", torch.bfloat16)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        y = rms_norm(x, self.weight, self.eps)
        assert isinstance(y, torch.Tensor)
        return y


class CoreAttention(torch.nn.Module):
    """Causal self-attention with the call that Megatron-core's SelfAttention makes; sequence-first [tokens, batch, heads, D]."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any) -> None:
        super().__init__()
        self.scale = options.get("softmax_scale")
        self.window = getattr(config, "window_size", None)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        packed_seq_params: Any = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of every sequence on its own; packed sequences by packed_seq_params.cu_seqlens_q."""
        if packed_seq_params is not None:
            q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
            starts = packed_seq_params.cu_seqlens_q.to(torch.int32)
            longest = int(packed_seq_params.max_seqlen_q)
            out = attention(q, k, v, q_starts=starts, max_q_len=longest, scale=self.scale, window=self._window())
            return out.reshape(*query.shape[:-2], -1)
        tokens, batch = query.shape[:2]
        q, k, v = (x.transpose(0, 1).reshape(batch * tokens, *x.shape[2:]) for x in (query, key, value))
        starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * tokens
        out = attention(q, k, v, q_starts=starts, max_q_len=tokens, scale=self.scale, window=self._window())
        return out.view(batch, tokens, -1).transpose(0, 1)

    def _window(self) -> int | None:
        if self.window is None:
            return None
        return int(self.window[0]) + 1 if isinstance(self.window, tuple) else int(self.window)


def megatron_layer_spec(spec: Any) -> Any:
    """A copy of a Megatron-core ModuleSpec whose RMSNorms and core attention are this package's.

    Names looked for, at any depth of `submodules`: the norms in NORM_SLOTS and `core_attention`. A slot that holds an identity
    (no norm there) stays as it is. Enter `enable.enable_aten` in the worker for the matrix products.
    """
    spec = copy.deepcopy(spec)
    _replace(spec)
    return spec


def _replace(node: Any) -> None:
    submodules = getattr(node, "submodules", None)
    if submodules is None:
        return
    for name, child in list(vars(submodules).items()):
        if name in NORM_SLOTS and "Identity" not in _name_of(child):
            setattr(submodules, name, RmsNorm)
        elif name == "core_attention":
            setattr(submodules, name, CoreAttention)
        else:
            _replace(child)


def _name_of(child: Any) -> str:
    return str(getattr(getattr(child, "module", child), "__name__", ""))


def sglang_model(model: torch.nn.Module) -> int:
    """Route SGLang's RMSNorm layers of a loaded model through `rms_norm`, with and without residual; returns how many.

    SGLang's layers are called as norm(x) or norm(x, residual) and return y or (y, x + residual), which is `rms_norm`'s own
    convention. Attention stays the engine's: choose its `fa3` backend with one split, or serve with this package's engine.
    """
    taken = 0
    for module in model.modules():
        if type(module).__name__ == "RMSNorm" and hasattr(module, "variance_epsilon"):
            module.forward = _SglangNorm(module)
            taken += 1
    return taken


class _SglangNorm:
    """The forward of one SGLang norm layer."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weight: Any = module.weight
        self.eps = float(module.variance_epsilon)  # type: ignore[arg-type]  # an attribute of any module

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, self.weight.data, self.eps, residual)
