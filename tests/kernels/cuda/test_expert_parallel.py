"""A layer of experts split over real process groups: outputs and gradients of one rank that holds all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from miles_plan.kernels.cuda.expert_rows import expert_order, expert_rows
from miles_plan.kernels.cuda.experts import swiglu_experts
from miles_plan.kernels.cuda.moe_combine import moe_combine
from miles_plan.kernels.cuda.router import router
from tests.kernels.cuda.ranks import on_ranks


@dataclass(frozen=True)
class Layer:
    """A mixture of experts and how many tokens go through it."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    dtype: torch.dtype

    def drawn(self, device: torch.device) -> list[torch.Tensor]:
        """Tokens, router logits, the experts' two weights, and the gradient of the output."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = (
            (self.tokens, self.hidden), (self.tokens, self.experts), (self.experts, 2 * self.inner, self.hidden),
            (self.experts, self.hidden, self.inner), (self.tokens, self.hidden),
        )  # fmt: skip
        scales = (1.0, 1.0, self.hidden**-0.5, self.inner**-0.5, 1.0)
        types = (self.dtype, torch.float32, self.dtype, self.dtype, self.dtype)
        return [
            (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
            for shape, scale, dtype in zip(shapes, scales, types, strict=True)
        ]


SMALL = Layer(24, 64, 32, 8, 2, torch.float32)  # where another order shows
QWEN3_30B_A3B = Layer(1024, 2048, 768, 128, 8, torch.bfloat16)  # on Hopper's kernels


class _Exchanged(torch.autograd.Function):
    """Rows sent to other ranks; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.counts = sent, received
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sent, received = ctx.counts
        out = grads[0].new_empty(sum(sent), grads[0].shape[1])
        dist.all_to_all_single(out, grads[0].contiguous(), sent, received)
        return out, None, None


def through_experts(
    x: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, top_k: int, ranks: int
) -> torch.Tensor:
    """The layer's output for x, [tokens, hidden]; with several ranks, up and down are this rank's experts and x its tokens."""
    weights, ids = router(logits, top_k)
    order = expert_order(ids, logits.shape[1])
    rows = expert_rows(x, order)
    if ranks == 1:
        return moe_combine(swiglu_experts(rows, up, down, order.counts), order.place, weights)
    theirs = torch.empty_like(order.counts)
    dist.all_to_all_single(theirs, order.counts)
    theirs = theirs.view(ranks, -1)  # rows of each rank for each expert here
    sent, received = order.counts.view(ranks, -1).sum(1).tolist(), theirs.sum(1).tolist()
    arrived = _Exchanged.apply(rows, sent, received)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    experts = torch.arange(theirs.shape[1], device=x.device).repeat(ranks)
    by_expert = torch.argsort(torch.repeat_interleave(experts, theirs.flatten()), stable=True)
    done = swiglu_experts(arrived[by_expert], up, down, theirs.sum(0, dtype=torch.int32))
    back = _Exchanged.apply(done[torch.argsort(by_expert)], received, sent)  # type: ignore[no-untyped-call]
    return moe_combine(back, order.place, weights)


def gradients(parts: list[torch.Tensor], grad: torch.Tensor, top_k: int, ranks: int) -> list[torch.Tensor]:
    """The output, and the gradients of tokens, logits and both weights."""
    leaves = [part.clone().requires_grad_() for part in parts]
    out = through_experts(*leaves, top_k=top_k, ranks=ranks)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def split_over_ranks_as_whole(layer: Layer, rank: int, ranks: int, device: torch.device) -> None:
    """This rank's part of outputs and gradients against what it computes alone."""
    x, logits, up, down, grad = layer.drawn(device)
    tokens, experts = (slice(rank * size // ranks, (rank + 1) * size // ranks) for size in (layer.tokens, layer.experts))
    whole = gradients([x, logits, up, down], grad, layer.top_k, 1)
    mine = gradients([x[tokens], logits[tokens], up[experts], down[experts]], grad[tokens], layer.top_k, ranks)
    of = (tokens, tokens, tokens, experts, experts)
    for name, part, want, share in zip(("out", "dx", "dlogits", "dup", "ddown"), mine, whole, of, strict=True):
        assert torch.equal(part, want[share]), (name, int((part != want[share]).sum()), part.numel())


def test_two_ranks_on_cpus() -> None:
    on_ranks(split_over_ranks_as_whole, (SMALL,), 2)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_on_gpus(ranks: int) -> None:
    on_ranks(split_over_ranks_as_whole, (SMALL, QWEN3_30B_A3B), ranks, gpus=True)
