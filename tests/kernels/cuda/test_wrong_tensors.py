"""Every tensor of every op, given with a wrong dtype, on a wrong device, with gaps in its rows or a dimension too many: a
ValueError that names the argument and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.expert_rows import expert_order
from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.log_prob import log_prob, log_softmax
from miles_plan.kernels.cuda.matmul import matmul, tree_partial
from miles_plan.kernels.cuda.moe_combine import moe_combine
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import rope
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.sample import sample
from miles_plan.kernels.cuda.swiglu import swiglu


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


LONG = torch.int64
OPS: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]] = {
    "matmul": (matmul, {"x": half(4, 128), "weight": half(64, 128)}),
    "tree_partial": (lambda **t: tree_partial(ranks=1, **t), {"x": half(4, 128), "weight": half(64, 128)}),
    "column_parallel_linear": (column_parallel_linear, {"x": half(4, 128), "weight": half(128, 128)}),
    "row_parallel_linear": (row_parallel_linear, {"x": half(4, 128), "weight": half(128, 128)}),
    "grouped_matmul": (
        grouped_matmul, {"x": half(4, 128), "weight": half(2, 64, 128), "counts": torch.tensor([3, 1], dtype=torch.int32)},
    ),
    "fp8_matmul": (
        fp8_matmul,
        {"x": fp8(4, 128), "x_scale": torch.ones(4, 1), "weight": fp8(128, 128), "weight_scale": torch.ones(1, 1)},
    ),
    "fp8_grouped_matmul": (
        fp8_grouped_matmul,
        {
            "x": fp8(4, 128), "x_scale": torch.ones(4, 1), "weight": fp8(2, 128, 128), "weight_scale": torch.ones(2, 1, 1),
            "counts": torch.tensor([3, 1], dtype=torch.int32),
        },
    ),
    "quantize_rows": (quantize_rows, {"x": half(4, 128)}),
    "moe_combine": (moe_combine, {"rows": half(8, 16), "index": ints(4, 2), "weights": torch.ones(4, 2)}),
    "router": (lambda **t: router(top_k=2, **t), {"logits": torch.zeros(4, 8), "bias": torch.zeros(8), "ids": ints(4, 2)}),
    "attention": (
        attention,
        {
            "q": half(6, 4, 64), "k": half(9, 2, 64), "v": half(9, 2, 64), "q_starts": torch.tensor([0, 6], dtype=torch.int32),
            "kv_starts": ints(1), "kv_lens": torch.tensor([9], dtype=torch.int32),
        },
    ),
    "paged attention": (
        attention,
        {
            "q": half(6, 4, 64), "k": half(3, 16, 2, 64), "v": half(3, 16, 2, 64),
            "kv_lens": torch.tensor([20], dtype=torch.int32), "page_table": torch.tensor([[2, 0]], dtype=torch.int32),
        },
    ),
    "rms_norm": (rms_norm, {"x": half(4, 32), "weight": half(32), "residual": half(4, 32)}),
    "rope": (
        rope,
        {
            "q": half(4, 2, 32), "k": half(4, 1, 32), "cos": torch.zeros(9, 16), "sin": torch.zeros(9, 16),
            "positions": ints(4), "q_norm": half(32), "k_norm": half(32),
        },
    ),
    "swiglu": (swiglu, {"x": half(4, 32)}),
    "embedding": (embedding, {"ids": ints(4), "weight": half(8, 16)}),
    "log_prob": (log_prob, {"logits": half(4, 32), "targets": ints(4)}),
    "log_softmax": (log_softmax, {"logits": half(4, 32)}),
    "linear_log_prob": (linear_log_prob, {"hidden": half(4, 16), "weight": half(32, 16), "targets": ints(4)}),
    "sample": (sample, {"logits": half(4, 32), "seeds": ints(4, dtype=LONG), "positions": ints(4, dtype=LONG)}),
    "expert_order": (lambda **t: expert_order(experts=4, **t), {"ids": ints(4, 2)}),
}  # fmt: skip


def wrong(name: str, tensor: torch.Tensor, others: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield "dtype", tensor.to(torch.complex64)
    if others:
        yield "device", tensor.to("meta")
    if name != "ids" or tensor.dim() > 1:  # embedding takes ids of any shape
        yield "dimensions", tensor[None]
    if tensor.dim() > 1 and tensor.dtype not in (torch.int32, torch.int64):
        yield "gaps", torch.stack((tensor, tensor), -1)[..., 0]


FREE = {(op, "x", "dimensions") for op in ("matmul", "tree_partial", "column_parallel_linear", "row_parallel_linear", "swiglu")}
FREE |= {(op, scale, "gaps") for op in ("fp8_matmul", "fp8_grouped_matmul") for scale in ("x_scale", "weight_scale")}
FREE |= {("rms_norm", "x", "dimensions")}  # the residual's shape is then the one that is named
CASES = [
    pytest.param(op, argument, kind, id=f"{op}-{argument}-{kind}")
    for op, (_, tensors) in OPS.items()
    for argument, tensor in tensors.items()
    for kind, _ in wrong(argument, tensor, len(tensors) - 1)
    if (op, argument, kind) not in FREE
]


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_are_right_as_they_stand(op: str) -> None:
    call, tensors = OPS[op]
    call(**tensors)


@pytest.mark.parametrize(("op", "argument", "kind"), CASES)
def test_a_wrong_tensor_is_named(op: str, argument: str, kind: str) -> None:
    call, tensors = OPS[op]
    given = dict(wrong(argument, tensors[argument], len(tensors) - 1))[kind]
    with pytest.raises(ValueError, match="allowed") as raised:
        call(**{**tensors, argument: given})
    if kind != "device":  # of two tensors on two devices either may be named
        assert argument in str(raised.value).split("; ")[0], str(raised.value)
