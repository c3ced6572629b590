"""No tokens at all, as an idle rank has them: nothing raises, results are empty, weights' gradients zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from miles_plan.backends.training.scores import VocabParallelScores
from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.expert_rows import expert_order, expert_rows
from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.log_prob import log_prob, log_softmax
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.moe_combine import moe_combine
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import rope
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.sample import sample
from miles_plan.kernels.cuda.swiglu import swiglu

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


class Inputs:
    """Inputs on a device, and the weights among them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: list[torch.Tensor] = []

    def tokens(self, *width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(0, *width, dtype=dtype, device=self.device, requires_grad=True)

    def weight(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        self.weights.append(torch.ones(shape, dtype=dtype, device=self.device, requires_grad=True))
        return self.weights[-1]

    def whole(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def experts(x: Inputs) -> Outputs:
    order = expert_order(x.whole(0, 2), 3)
    rows = grouped_matmul(expert_rows(x.tokens(256), order), x.weight(3, 128, 256), order.counts)
    return moe_combine(rows, order.place, torch.zeros(0, 2, device=x.device))


def fp8(x: Inputs) -> Outputs:
    values, scales = quantize_rows(x.tokens(256).detach())
    weight, scale = torch.zeros(2, 128, 256, device=x.device).to(torch.float8_e4m3fn), torch.ones(2, 1, 2, device=x.device)
    grouped = fp8_grouped_matmul(values, scales, weight, scale, x.whole(2, dtype=torch.int32))
    return fp8_matmul(values, scales, weight[0], scale[0]), grouped


def turned(x: Inputs) -> Outputs:
    angles = torch.zeros(9, 32, device=x.device)
    return rope(x.tokens(4, 64), x.tokens(2, 64), angles, angles, x.whole(0))


OPS: dict[str, Callable[[Inputs], Outputs]] = {
    "matmul chain": lambda x: matmul(x.tokens(256), x.weight(128, 256)),
    "matmul tree": lambda x: matmul(x.tokens(256), x.weight(128, 256), order="tree", grad_order="tree"),
    "matmul float32": lambda x: matmul(x.tokens(256, dtype=torch.float32), x.weight(128, 256, dtype=torch.float32)),
    "column_parallel_linear": lambda x: column_parallel_linear(x.tokens(256), x.weight(128, 256)),
    "row_parallel_linear": lambda x: row_parallel_linear(x.tokens(256), x.weight(128, 256)),
    "experts": experts,
    "fp8": fp8,
    "router": lambda x: router(x.tokens(16, dtype=torch.float32), 4),
    "rms_norm": lambda x: rms_norm(x.tokens(256), x.weight(256), 1e-6),
    "rms_norm with a residual": lambda x: rms_norm(x.tokens(256), x.weight(256), 1e-6, x.tokens(256)),
    "swiglu": lambda x: swiglu(x.tokens(256)),
    "rope": turned,
    "embedding": lambda x: embedding(x.whole(0), x.weight(40, 64)),
    "attention": lambda x: attention(x.tokens(4, 128), x.tokens(2, 128), x.tokens(2, 128)),
    "attention of other heads": lambda x: attention(x.tokens(4, 80), x.tokens(2, 80), x.tokens(2, 80)),
    "log_prob": lambda x: log_prob(x.tokens(512), x.whole(0)),
    "log_softmax": lambda x: log_softmax(x.tokens(512)),
    "linear_log_prob": lambda x: linear_log_prob(x.tokens(256), x.weight(512, 256), x.whole(0)),
    "vocab_scores": lambda x: VocabParallelScores.apply(x.tokens(512), x.whole(0), 0, 511, 0.7, None),  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    "sample": lambda x: sample(x.tokens(500).detach(), x.whole(0), x.whole(0), top_p=0.9),
}  # fmt: skip


def run(name: str, device: torch.device) -> None:
    inputs = Inputs(device)
    out = OPS[name](inputs)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    assert all(each.numel() == 0 for each in outputs)
    if grown := [each for each in outputs if each.requires_grad]:
        torch.autograd.backward(grown, [torch.zeros_like(each) for each in grown])
    for weight in inputs.weights:
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str) -> None:
    run(name, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_no_tokens_on_a_gpu(gpu: torch.device, name: str) -> None:
    run(name, gpu)
