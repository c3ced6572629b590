"""Running a shape's own kernels once, so that they are compiled; nothing is timed or compared."""

from __future__ import annotations

import torch

from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.log_prob import log_prob
from miles_plan.kernels.cuda.matmul import input_gradient, matmul, weight_gradient
from miles_plan.kernels.cuda.rms_norm import rms_norm

from .attentions import Batch
from .layer import Layer
from .shapes import Shape

DEVICE = "cuda"
MOST_BYTES = 2**32  # of an operand; many workers share the device


def warm(shape: Shape) -> None:
    """One call of each op the shape times, skipped where its operands are too large for many workers at once (such a shape
    shares its kernels with a smaller one)."""
    with torch.no_grad():
        _CALLS[shape.op](shape)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


def _matmul(shape: Shape) -> None:
    m, n, k, dtype = shape["M"], shape["N"], shape["K"], getattr(torch, shape["dtype"])
    if max(m * n, n * k, m * k) * dtype.itemsize < MOST_BYTES:
        matmul(_empty(m, k, dtype=dtype), _empty(n, k, dtype=dtype), order=shape["order"])


def _gradients(shape: Shape) -> None:
    m, n, k, dtype = shape["M"], shape["N"], shape["K"], getattr(torch, shape["dtype"])
    grad = _empty(m, n, dtype=dtype)
    input_gradient(grad, _empty(n, k, dtype=dtype), shape["grad_order"])
    weight_gradient(grad, _empty(m, k, dtype=dtype))


def _grouped(shape: Shape) -> None:
    rows, dtype = shape["tokens"] * shape["top_k"], getattr(torch, shape["dtype"])
    counts = _even(rows, shape["experts"])
    grouped_matmul(_empty(rows, shape["K"], dtype=dtype), _empty(shape["experts"], shape["N"], shape["K"], dtype=dtype), counts)


def _even(rows: int, experts: int) -> torch.Tensor:
    counts = torch.full((experts,), rows // experts, device=DEVICE, dtype=torch.int32)
    counts[: rows % experts] += 1
    return counts


def _fp8(shape: Shape) -> None:
    m, n, k = shape["M"], shape["N"], shape["K"]
    values, scales = quantize_rows(_empty(m, k, dtype=torch.bfloat16))
    fp8_matmul(values, scales, _empty(n, k, dtype=torch.float8_e4m3fn), _empty(-(-n // 128), k // 128, dtype=torch.float32))


def _fp8_grouped(shape: Shape) -> None:
    rows, experts, n, k = shape["tokens"] * shape["top_k"], shape["experts"], shape["N"], shape["K"]
    values, scales = quantize_rows(_empty(rows, k, dtype=torch.bfloat16))
    weight = _empty(experts, n, k, dtype=torch.float8_e4m3fn)
    w_scales = _empty(experts, -(-n // 128), k // 128, dtype=torch.float32)
    fp8_grouped_matmul(values, scales, weight, w_scales, _even(rows, experts))


def _attention(shape: Shape) -> None:
    batch = Batch(shape)
    batch.ours(*batch.kv[0])


def _log_prob(shape: Shape) -> None:
    rows = min(shape["rows"], 64)
    log_prob(
        _empty(rows, shape["vocab"], dtype=getattr(torch, shape["dtype"])), torch.zeros(rows, device=DEVICE, dtype=torch.int64)
    )


def _rms_norm(shape: Shape) -> None:
    dtype = getattr(torch, shape["dtype"])
    x = _empty(min(shape["rows"], 64), shape["width"], dtype=dtype)
    rms_norm(x, _empty(shape["width"], dtype=dtype), 1e-6, x if shape["residual"] else None)


def _layer(shape: Shape) -> None:
    Layer(shape["batch"], shape["q_len"], shape["kv_len"]).ours()


_CALLS = {
    "matmul": _matmul,
    "matmul_gradients": _gradients,
    "grouped_matmul": _grouped,
    "fp8_matmul": _fp8,
    "fp8_grouped_matmul": _fp8_grouped,
    "attention": _attention,
    "log_prob": _log_prob,
    "rms_norm": _rms_norm,
    "decoder_layer": _layer,
}
