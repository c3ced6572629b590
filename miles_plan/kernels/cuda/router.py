"""Choosing experts: scores, top k with ties to the lower index, and the weights of the chosen.

Softmax or sigmoid scores, the selection bias and the group limit of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Experts may
also be given, as a rollout recorded them (rollout routing replay, arXiv 2510.11370); their weights still come from the logits.
One token a program in float32; the router's product itself is `matmul(x, weight, out_dtype=torch.float32)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import arguments
from .device import runs_triton, steady
from .toolchain import jit, tl

Scoring = Literal["softmax", "sigmoid"]
SCORINGS = ("softmax", "sigmoid")
MOST_EXPERTS = 1024
MOST_CHOSEN = 32


@dataclass(frozen=True, slots=True)
class Rule:
    """How experts are chosen and weighted; the fields are `router`'s arguments."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    groups: int = 1
    groups_kept: int = 1
    scale: float = 1.0


@jit
def _scores(logits: tl.tensor, at: tl.tensor, e: tl.tensor, EXPERTS: tl.constexpr, SIGMOID: tl.constexpr) -> tl.tensor:
    """Scores of one token's experts, zero past the last expert."""
    there = e < EXPERTS
    x = tl.load(logits + at + e, mask=there, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        weights = tl.exp(x - tl.max(x, 0))
        scores = weights / tl.sum(weights, 0)
    return tl.where(there, scores, 0.0)


@jit
def _first_best(values: tl.tensor, e: tl.tensor, PAD: tl.constexpr) -> tl.tensor:
    """The index of the largest value, the lowest one among equals."""
    return tl.min(tl.where(values == tl.max(values, 0), e, PAD), 0)


@jit
def _allowed(values: tl.tensor, GROUPS: tl.constexpr, KEEP: tl.constexpr, PAD: tl.constexpr) -> tl.tensor:
    """Values of the KEEP groups whose two best add up highest; -inf elsewhere."""
    SIZE: tl.constexpr = PAD // GROUPS
    grid = tl.reshape(values, (GROUPS, SIZE))
    member = tl.arange(0, SIZE)[None, :]
    best = tl.max(grid, 1)
    where = tl.min(tl.where(grid == best[:, None], member, SIZE), 1)
    second = tl.max(tl.where(member == where[:, None], float("-inf"), grid), 1)
    group = tl.arange(0, GROUPS)
    score = best + second
    kept = tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(KEEP):
        chosen = _first_best(score, group, GROUPS)
        kept = tl.where(group == chosen, 1, kept)
        score = tl.where(group == chosen, float("-inf"), score)
    return tl.reshape(tl.where(kept[:, None] == 1, grid, float("-inf")), (PAD,))


@jit
def router_kernel(
    logits: tl.tensor, bias: tl.tensor, weights: tl.tensor, ids: tl.tensor, scale: tl.tensor,
    EXPERTS: tl.constexpr, PAD: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr, KEEP: tl.constexpr, GIVEN: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token. GIVEN takes the experts from `ids` instead of choosing them."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PAD)
    scores = _scores(logits, token * EXPERTS, e, EXPERTS, SIGMOID)
    if not GIVEN:
        left = tl.where(e < EXPERTS, scores, float("-inf"))
        if BIAS:
            left += tl.load(bias + e, mask=e < EXPERTS, other=0.0)
        if GROUPS > 1:
            left = _allowed(left, GROUPS, KEEP, PAD)
        for slot in tl.static_range(CHOSEN):
            best = _first_best(left, e, PAD)
            tl.store(ids + token * CHOSEN + slot, best)
            left = tl.where(e == best, float("-inf"), left)
        tl.debug_barrier()  # the ids are read again below, by other threads
    kept = tl.zeros((PAD,), tl.int32)
    for slot in tl.static_range(CHOSEN):
        kept = tl.where(e == tl.load(ids + token * CHOSEN + slot), 1, kept)
    total = tl.sum(tl.where(kept == 1, scores, 0.0), 0)
    for slot in tl.static_range(CHOSEN):
        value = tl.sum(tl.where(e == tl.load(ids + token * CHOSEN + slot), scores, 0.0), 0)
        if RENORMALIZE:
            value = value / total
        tl.store(weights + token * CHOSEN + slot, value * scale)


@jit
def router_gradient_kernel(
    logits: tl.tensor, ids: tl.tensor, grad: tl.tensor, out: tl.tensor, scale: tl.tensor,
    EXPERTS: tl.constexpr, PAD: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: one token; the chosen are constants, and sums over them run over all experts as in `router_kernel`."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PAD)
    scores = _scores(logits, token * EXPERTS, e, EXPERTS, SIGMOID)
    kept = tl.zeros((PAD,), tl.int32)
    given = tl.zeros((PAD,), tl.float32)
    for slot in tl.static_range(CHOSEN):
        chosen = tl.load(ids + token * CHOSEN + slot)
        kept = tl.where(e == chosen, 1, kept)
        given = tl.where(e == chosen, tl.load(grad + token * CHOSEN + slot), given)
    d_scores = given * scale
    if RENORMALIZE:
        total = tl.sum(tl.where(kept == 1, scores, 0.0), 0)
        inner = tl.sum(given * scores, 0)
        d_scores = tl.where(kept == 1, d_scores / total - scale * inner / (total * total), 0.0)
    if SIGMOID:
        d_logits = d_scores * scores * (1.0 - scores)
    else:
        d_logits = scores * (d_scores - tl.sum(scores * d_scores, 0))
    tl.store(out + token * EXPERTS + e, d_logits, mask=e < EXPERTS)


def router(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias: torch.Tensor | None = None,
    renormalize: bool = True,
    groups: int = 1,
    groups_kept: int = 1,
    scale: float = 1.0,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each token: weights float32 [tokens, top_k] and ids int32 [tokens, top_k], best first.

    logits: float32 [tokens, experts], contiguous, at most 1024 experts. scoring: "softmax" or "sigmoid".
    bias: float32 [experts], added for the choice only. renormalize: weights of a token add up to 1 before `scale`.
    groups, groups_kept: only the experts of the best groups may be chosen (a group's score is its two best); both powers of
        two of a power-of-two number of experts.
    ids: int32 [tokens, top_k], contiguous: experts that were chosen elsewhere, in any order; nothing is chosen here then.
        Every id must be an expert's.

    Ties go to the lower index. One token's sums run over all experts in the one layout of their number, so its weights depend
    on the set of its experts and not on their order. Differentiable in logits through the weights. Raises ValueError naming
    a wrong argument.
    """
    _check(logits, top_k, scoring, bias, groups, groups_kept)
    if ids is not None:
        arguments.require_dtype("ids", ids, (torch.int32,))
        arguments.require_shape("ids", ids, (logits.shape[0], top_k), "[tokens, top_k]")
        arguments.require_contiguous("ids", ids)
        arguments.require_same_device(logits=logits, ids=ids)
    rule = Rule(top_k, scoring, renormalize, groups, groups_kept, scale)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Router.apply(logits, bias, ids, rule)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(logits, bias, ids, rule)


def _check(logits: torch.Tensor, top_k: int, scoring: str, bias: torch.Tensor | None, groups: int, groups_kept: int) -> None:
    arguments.require_dims("logits", logits, 2, "[tokens, experts]")
    arguments.require_dtype("logits", logits, (torch.float32,))
    arguments.require_contiguous("logits", logits)
    experts = logits.shape[1]
    arguments.require_range("the number of experts in logits", experts, 1, MOST_EXPERTS)
    arguments.require_range("top_k", top_k, 1, min(experts, MOST_CHOSEN))
    arguments.require_same_device(logits=logits, bias=bias)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring is {scoring!r}; allowed: {', '.join(SCORINGS)}")
    if bias is not None:
        arguments.require_dtype("bias", bias, (torch.float32,))
        arguments.require_shape("bias", bias, (experts,), "[experts]")
    if groups != 1:
        powers = all(n & (n - 1) == 0 for n in (groups, experts))
        if not powers or experts < 2 * groups or not 1 <= groups_kept <= groups:
            raise ValueError(
                f"groups is {groups} with groups_kept {groups_kept} and {experts} experts; allowed: powers of two, two or "
                "more experts a group, and 1 to groups kept"
            )
        if top_k > experts // groups * groups_kept:
            raise ValueError(
                f"top_k is {top_k}; allowed: at most the {experts // groups * groups_kept} experts of the kept groups"
            )


def router_reference(
    logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    scores = _reference_scores(logits, rule)
    if ids is None:
        ids = _chosen(scores if bias is None else scores + bias, rule)
    weights = scores.gather(1, ids.long())
    if rule.renormalize:
        weights = weights / _reference_total(scores, ids)
    return weights * rule.scale, ids


def _reference_scores(logits: torch.Tensor, rule: Rule) -> torch.Tensor:
    return torch.softmax(logits, -1) if rule.scoring == "softmax" else 1.0 / (1.0 + torch.exp(-logits))


def _reference_total(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (scores * torch.zeros_like(scores).scatter(1, ids.long(), 1.0)).sum(-1, keepdim=True)


def _chosen(ranked: torch.Tensor, rule: Rule) -> torch.Tensor:
    if rule.groups > 1:
        grid = ranked.view(ranked.shape[0], rule.groups, -1)
        two = torch.sort(grid, dim=-1, descending=True, stable=True).values[..., :2].sum(-1)
        kept = torch.sort(two, dim=-1, descending=True, stable=True).indices[:, : rule.groups_kept]
        mask = torch.zeros_like(two, dtype=torch.bool).scatter(1, kept, True)
        ranked = grid.masked_fill(~mask[..., None], float("-inf")).view(ranked.shape)
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, : rule.top_k].to(torch.int32)


def _forward(
    logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(logits.device):
        return router_reference(logits, bias, ids, rule)
    tokens, experts = logits.shape
    logits = steady(logits)
    weights = torch.empty(tokens, rule.top_k, device=logits.device, dtype=torch.float32)
    chosen = torch.empty(tokens, rule.top_k, device=logits.device, dtype=torch.int32) if ids is None else ids
    if tokens:
        router_kernel[(tokens,)](
            logits, logits if bias is None else bias, weights, chosen, rule.scale, EXPERTS=experts,
            PAD=1 << (experts - 1).bit_length(), CHOSEN=rule.top_k, SIGMOID=rule.scoring == "sigmoid", BIAS=bias is not None,
            RENORMALIZE=rule.renormalize, GROUPS=rule.groups, KEEP=rule.groups_kept, GIVEN=ids is not None, num_warps=1,
        )  # fmt: skip
    return weights, chosen


class _Router(torch.autograd.Function):
    """router with the gradient of its weights."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None, rule: Rule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = _forward(logits, bias, ids, rule)
        chosen = chosen if ids is None else chosen.clone()  # a Function may not return its input
        ctx.save_for_backward(logits, chosen)
        ctx.rule = rule
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, ids = ctx.saved_tensors
        rule: Rule = ctx.rule
        grad = grads[0].contiguous()
        if not runs_triton(logits.device):
            return _reference_gradient(logits, ids, grad, rule), None, None, None
        out = torch.empty_like(logits)
        if ids.numel():
            router_gradient_kernel[(logits.shape[0],)](
                steady(logits), ids, grad, out, rule.scale, EXPERTS=logits.shape[1],
                PAD=1 << (logits.shape[1] - 1).bit_length(), CHOSEN=ids.shape[1], SIGMOID=rule.scoring == "sigmoid",
                RENORMALIZE=rule.renormalize, num_warps=1,
            )  # fmt: skip
        return out, None, None, None


def _reference_gradient(logits: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor, rule: Rule) -> torch.Tensor:
    scores = _reference_scores(logits, rule)
    given = torch.zeros_like(scores).scatter(1, ids.long(), grad)
    d_scores = given * rule.scale
    if rule.renormalize:
        total, inner = _reference_total(scores, ids), (given * scores).sum(-1, keepdim=True)
        kept = torch.zeros_like(scores).scatter(1, ids.long(), 1.0)
        d_scores = kept * (d_scores / total - rule.scale * inner / (total * total))
    if rule.scoring == "sigmoid":
        return d_scores * scores * (1.0 - scores)
    return scores * (d_scores - (scores * d_scores).sum(-1, keepdim=True))
