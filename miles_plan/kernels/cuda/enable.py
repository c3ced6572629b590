"""Putting the kernels under a model that does not know of them.

Four hooks, all undone when the context ends:

- `aten::mm`, `addmm`, `bmm` and `_log_softmax` go to `matmul`, `grouped_matmul` and `log_softmax`. This is below autograd and
  holds in every thread, so a model's backward products go there too (the way of Thinking Machines' `batch_invariant_ops`).
- `torch.nn.functional.scaled_dot_product_attention`, `embedding` and `rms_norm` go to `attention`, `embedding` and `rms_norm`.
- Modules of the model that compute an RMSNorm by hand (transformers' do) compute it with `rms_norm`.
- Modules of the model that hold stacked experts (transformers' do) compute with `grouped_matmul`, `swiglu` and `moe_combine`.

A call that the kernels do not cover raises ValueError: falling back silently would break the promise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .arguments import require_dtype
from .attention import attention
from .device import runs_triton
from .embedding import embedding
from .expert_rows import expert_order, expert_rows
from .experts import swiglu_experts
from .gemm import gemm
from .grouped_matmul import grouped_matmul
from .log_prob import log_softmax
from .matmul import matmul_reference
from .moe_combine import moe_combine
from .rms_norm import rms_norm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROBE_ROWS = 4
PROBE_TOLERANCE = 0.05
DISPATCH_KEYS = {"cuda": "CUDA", "cpu": "CPU"}


@contextlib.contextmanager
def enable(model: torch.nn.Module | None = None) -> Iterator[None]:
    """While the context lasts, run `model` (and any torch code in this process) on the batch-invariant kernels.

    model: a model on one kind of device whose RMSNorm and expert modules are to be taken over; None takes over functions only,
    on CUDA. On a CPU the references run, which is slow and has the kernels' order of sums. Use attn_implementation="sdpa" with
    transformers. The model itself is not changed once the context has ended.
    """
    device_type = "cuda" if model is None else next(model.parameters()).device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(enable_aten(device_type))
        stack.enter_context(_Functions(device_type))
        if model is not None:
            stack.enter_context(_taken_over(model))
        yield


@contextlib.contextmanager
def enable_aten(device_type: str = "cuda") -> Iterator[None]:
    """Only the first hook: matrix products and log-softmax of every thread of this process, on "cuda" or "cpu". What a
    Megatron-core or SGLang worker needs around its own layers; `hooks_megatron` and `hooks_sglang` have the rest."""
    if device_type not in DISPATCH_KEYS:
        raise ValueError(f"device_type is {device_type!r}; allowed: {', '.join(DISPATCH_KEYS)}")
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's class is untyped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced, which is the point
        for name, function in (("mm", _mm), ("addmm", _addmm), ("bmm", _bmm), ("_log_softmax", _log_softmax)):
            library.impl(name, function, DISPATCH_KEYS[device_type])
    try:
        yield
    finally:
        library._destroy()


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N], each stored row by row or column by column."""
    require_dtype("the product's operand", a, DTYPES)
    if not runs_triton(a.device):
        return matmul_reference(a, b.T).to(a.dtype)
    out = torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=a.dtype)
    if a.shape[1] == 0:
        return out.zero_()
    a_km = a.stride(1) != 1 and a.stride(0) == 1
    b_kn = b.stride(0) != 1
    a = a if a_km or a.stride(1) == 1 else a.contiguous()
    b = b if not b_kn or b.stride(1) == 1 else b.contiguous()
    gemm(a.T if a_km else a, b if b_kn else b.T, out, a_km=a_km, b_kn=b_kn)
    return out


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> torch.Tensor:
    """beta * bias + alpha * (a @ b); the product is rounded before the bias is added."""
    product = _mm(a, b)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, M, K] @ b [B, K, N] as one grouped product."""
    batch, m, k = a.shape
    counts = torch.full((batch,), m, device=a.device, dtype=torch.int32)
    with torch.no_grad():  # autograd has seen the operator already
        out = grouped_matmul(a.reshape(batch * m, k).contiguous(), b.transpose(1, 2).contiguous(), counts)
    return out.view(batch, m, b.shape[2])


def _log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """Log-softmax over any dimension."""
    moved = x.movedim(dim, -1)
    out_dtype = torch.float32 if half_to_float else x.dtype
    rows = moved.reshape(-1, moved.shape[-1])
    with torch.no_grad():  # autograd has seen the operator already
        return log_softmax(rows, out_dtype=out_dtype).view(moved.shape).movedim(-1, dim)


class _Functions(TorchFunctionMode):
    """The second hook: functions that torch does not route through one aten operator."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACED.get(func)
        kwargs = kwargs or {}
        if replacement is not None and any(isinstance(x, torch.Tensor) and x.device.type == self.device_type for x in args):
            return replacement(*args, **kwargs)
        return func(*args, **kwargs)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """scaled_dot_product_attention on [batch, heads, tokens, D]; see `visible_range` for the masks that are understood."""
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0.0")
    batch, heads, q_len, d = query.shape
    kv_heads, kv_len = key.shape[1:3]
    first, window, causal = visible_range(attn_mask, batch, q_len, kv_len, is_causal, query.device)
    q = query.transpose(1, 2)
    k, v = (x.transpose(1, 2).reshape(batch * kv_len, kv_heads, x.shape[-1]) for x in (key, value))
    starts = torch.arange(batch, device=query.device, dtype=torch.int32) * kv_len + first
    lens = (kv_len - first).to(torch.int32)
    shared = {"kv_starts": starts, "kv_lens": lens, "max_kv_len": kv_len, "window": window, "scale": scale}
    q_lens = lens.clamp(max=q_len)
    q_starts = torch.zeros(batch + 1, device=query.device, dtype=torch.int32)
    q_starts[1:] = torch.cumsum(q_lens, 0)
    if attn_mask is None:
        packed = q.reshape(batch * q_len, heads, d)
        out = attention(packed, k, v, q_starts=q_starts, max_q_len=q_len, causal=causal, **shared)  # type: ignore[arg-type]  # keywords of several types
        return out.view(batch, q_len, heads, -1).transpose(1, 2)
    real = torch.arange(q_len, device=query.device)[None, :] >= (q_len - q_lens)[:, None]
    out = attention(q[real].contiguous(), k, v, q_starts=q_starts, max_q_len=q_len, causal=causal, **shared)  # type: ignore[arg-type]  # keywords of several types
    spread = out.new_zeros(batch, q_len, heads, out.shape[-1])
    spread[real] = out
    return spread.transpose(1, 2)


def visible_range(
    mask: torch.Tensor | None, batch: int, q_len: int, kv_len: int, is_causal: bool, device: torch.device | None = None
) -> tuple[torch.Tensor, int | None, bool]:
    """What a mask says: each sequence's first key (on `device`, or where the mask is), the window, and whether attention is causal.

    Understood: no mask (causal only where queries and keys are as many, as torch has it), and masks, boolean or additive
    [batch, 1, q_len, kv_len], that mean causal attention over left-padded sequences, with or without a sliding window.
    """
    if mask is None:
        if is_causal and q_len != kv_len:
            raise ValueError(f"is_causal is set for {q_len} queries and {kv_len} keys; allowed: as many of each, or a mask")
        return torch.zeros(batch, device=device, dtype=torch.int32), None, is_causal
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"attn_mask has shape {list(mask.shape)}; allowed: [batch, 1, queries, keys]")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[:, 0].expand(batch, q_len, kv_len)
    key = torch.arange(kv_len, device=mask.device)
    place = torch.arange(kv_len - q_len, kv_len, device=mask.device)
    last = seen[:, -1]
    lowest = torch.where(last.any(1), last.int().argmax(1), kv_len - 1)
    first = torch.where(seen.any(2), seen.int().argmax(2), kv_len).amin(1)
    window = None
    if bool((lowest > first).any()):
        window = int((kv_len - lowest).max())
    low = first[:, None] if window is None else torch.maximum(first[:, None], place[None, :] - window + 1)
    expected = (key >= low[..., None]) & (key <= place[None, :, None])
    real = place[None, :] >= first[:, None]
    if not bool((expected == seen)[real].all()):
        raise ValueError("attn_mask is of no known form; allowed: causal over left-padded sequences, with a window or without")
    return first.to(torch.int32), window, True


def _embedding(
    ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> torch.Tensor:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise ValueError("max_norm, scale_grad_by_freq or sparse is set; allowed: a plain embedding")
    return embedding(ids, weight)


def _rms_norm(
    x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    if len(normalized_shape) != 1:
        raise ValueError(f"normalized_shape is {list(normalized_shape)}; allowed: the last dimension")
    weight = torch.ones(normalized_shape[0], device=x.device, dtype=x.dtype) if weight is None else weight
    y = rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    assert isinstance(y, torch.Tensor)
    return y


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: _sdpa,
    torch.nn.functional.embedding: _embedding,
    torch.nn.functional.rms_norm: _rms_norm,
}


@contextlib.contextmanager
def _taken_over(model: torch.nn.Module) -> Iterator[None]:
    """The third hook and the fourth."""
    forwards: dict[torch.nn.Module, Callable[..., torch.Tensor]]
    forwards = {module: _norm_forward for module in model.modules() if _is_rms_norm(module)}
    forwards |= {module: _experts_forward for module in model.modules() if _is_experts(module)}
    for module, forward in forwards.items():
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _epsilon(module: torch.nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _norm_forward(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    y = rms_norm(hidden_states, module.weight, _epsilon(module) or 0.0)  # type: ignore[arg-type]  # an attribute of any module
    assert isinstance(y, torch.Tensor)
    return y


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """A module with one weight vector whose result on random rows is an RMSNorm's; a probe, because names mislead (some
    families multiply by 1 + weight)."""
    parameters = dict(module.named_parameters(recurse=False))
    if "RMSNorm" not in type(module).__name__ or set(parameters) != {"weight"} or _epsilon(module) is None:
        return False
    weight = parameters["weight"]
    if weight.dim() != 1:
        return False
    x = _probe(weight, PROBE_ROWS, weight.numel())
    with torch.no_grad():
        return _alike(module(x), _norm_forward(module, x))


def _probe(like: torch.Tensor, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device=like.device).manual_seed(0)
    return torch.randn(shape, device=like.device, generator=generator).to(like.dtype)


def _alike(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return bool((theirs - ours).abs().max() <= PROBE_TOLERANCE * ours.abs().max().clamp(min=1e-3))


def _experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Rows through their experts, then a token's slots first to last."""
    up: Any = module.gate_up_proj
    order = expert_order(top_k_index, up.shape[0])
    down: Any = module.down_proj
    out = swiglu_experts(expert_rows(hidden_states, order), up, down, order.counts)
    return moe_combine(out, order.place, top_k_weights.float().contiguous())


def _is_experts(module: torch.nn.Module) -> bool:
    """A module with the two stacked weights of SwiGLU experts whose result on random rows is theirs; a probe, as for norms."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"} or any(weight.dim() != 3 for weight in parameters.values()):
        return False
    up, down = parameters["gate_up_proj"], parameters["down_proj"]
    experts, doubled, width = up.shape
    if down.shape != (experts, width, doubled // 2) or getattr(module, "_is_expert_parallel", False):
        return False
    x = _probe(up, PROBE_ROWS, width)
    ids = torch.arange(PROBE_ROWS, device=x.device)[:, None] % experts
    weights = torch.ones(PROBE_ROWS, 1, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        return _alike(module(x, ids, weights), _experts_forward(module, x, ids, weights))
