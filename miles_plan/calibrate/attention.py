"""Fused attention: the forward and backward of training at several lengths, and one token against a cache.

Every fused kernel that torch offers on the machine is tried, and the fastest is the point: engines choose it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from miles_plan.calibrate.points import AttentionPhase, AttentionPoint
from miles_plan.calibrate.timing import Call, Timing, rotations, time_calls

AttentionShape = tuple[int, int, int, int, int]
"""batch, tokens, heads, kv_heads, head_dim"""
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure_attention(device: torch.device, shapes: Sequence[AttentionShape], budget_s: float) -> tuple[AttentionPoint, ...]:
    """Causal attention of packed training batches, forward and backward."""
    found: list[AttentionPoint] = []
    each_s = budget_s / (2 * len(shapes))
    for shape in shapes:
        forward = _each_backend(partial(_forward_calls, shape, device), device, each_s, capture=False)
        backward = _each_backend(partial(_backward_calls, shape, device), device, each_s, capture=False)
        found += [*_fastest("forward", shape, forward), *_fastest("backward", shape, backward)]
    return tuple(found)


def measure_decode_attention(
    device: torch.device, shapes: Sequence[AttentionShape], budget_s: float
) -> tuple[AttentionPoint, ...]:
    """One query token a sequence. The heads that share a cached head are its rows, so that the cache is read once."""
    found: list[AttentionPoint] = []
    for shape in shapes:
        timings = _each_backend(partial(_decode_calls, shape, device), device, budget_s / len(shapes), capture=True)
        found += _fastest("decode", shape, timings)
    return tuple(found)


def _fastest(phase: AttentionPhase, shape: AttentionShape, timings: dict[str, Timing]) -> Iterator[AttentionPoint]:
    if not timings:
        return
    backend = min(timings, key=lambda name: timings[name].seconds)
    batch, tokens, heads, kv_heads, head_dim = shape
    yield AttentionPoint(
        phase=phase,
        backend=backend,
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        seconds=timings[backend].seconds,
        spread=timings[backend].spread,
    )


def _each_backend(
    make_calls: Callable[[], list[Call]], device: torch.device, budget_s: float, *, capture: bool
) -> dict[str, Timing]:
    """Timings by kernel, of those that take the shape on this machine."""
    names = ("cudnn", "flash", "efficient") if device.type == "cuda" else ("flash", "math")
    found = {}
    for name in names:
        with sdpa_kernel(BACKENDS[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch tells at length why a kernel does not take a shape
            try:
                calls = make_calls()
                calls[0]()
            except RuntimeError:  # torch says so for a kernel that lacks the shape, or is not built in
                continue
            found[name] = time_calls(calls, device, budget_s / len(names), capture=capture)
    return found


def _forward_calls(shape: AttentionShape, device: torch.device) -> list[Call]:
    return [partial(_causal, *_drawn(shape, device)) for _ in range(2)]


def _backward_calls(shape: AttentionShape, device: torch.device) -> list[Call]:
    calls: list[Call] = []
    for _ in range(2):
        inputs = tuple(each.requires_grad_() for each in _drawn(shape, device))
        out = _causal(*inputs)
        calls.append(partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True))
    return calls


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _drawn(shape: AttentionShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, heads, kv_heads, head_dim = shape
    q, k, v = (
        torch.randn(batch, count, tokens, head_dim, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def _decode_calls(shape: AttentionShape, device: torch.device) -> list[Call]:
    batch, tokens, heads, kv_heads, head_dim = shape
    calls: list[Call] = []
    for _ in range(rotations(2 * 2 * batch * kv_heads * tokens * head_dim)):
        q = torch.randn(batch, kv_heads, heads // kv_heads, head_dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, kv_heads, tokens, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        calls.append(partial(scaled_dot_product_attention, q, k, v))
    return calls
