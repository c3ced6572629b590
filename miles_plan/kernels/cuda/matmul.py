"""Matrix products whose bits do not depend on the batch, in two families.

*chain*: one accumulator over ascending K. The fastest, for layers that no rank splits along K (qkv, gate and up, the head).
*tree*: K in eight equal slices, each a chain, added as a balanced binary tree. For layers that tensor parallelism splits
along K (o_proj, down_proj): a rank of 2, 4 or 8 computes its subtree, `tree_all_reduce` adds the subtrees the same way, and
every size gives the bits of one.

`gemm_kernel` states the order and why no tile can show in it. The tree across ranks is that of Zhang et al.,
"Deterministic Inference across Tensor Parallel Sizes" (arXiv 2511.17826).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from . import arguments
from .device import runs_triton
from .gemm import TREE_LEAVES, gemm
from .tensor_core import add_tree, mma_chain, mma_tree

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Order = Literal["chain", "tree"]
ORDERS = ("chain", "tree")
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    order: Order = "chain",
    grad_order: Order = "chain",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ weight.T, as torch.nn.functional.linear: [..., K] and [N, K] to [..., N].

    x, weight: the same one of bf16, fp16 and fp32 (fp32 without TF32), last dimension contiguous, any number of rows from 0.
    order: "chain" or "tree", see the module's text; "tree" needs K a multiple of 128.
    grad_order: the order in which the gradient of x sums over N; "tree" for a layer whose N tensor parallelism splits.
    out_dtype: default x's; float32 keeps the accumulator.

    Differentiable: dx = dy @ weight by `grad_order`; dweight = dy^T @ x by one chain over the rows in ascending order.
    Raises ValueError naming a wrong argument.
    """
    _check(x, weight, order, grad_order, out_dtype)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Matmul.apply(x, weight, order, grad_order, out_dtype)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _product(x, weight, TREE_LEAVES if order == "tree" else 0, out_dtype)


def tree_partial(x: torch.Tensor, weight: torch.Tensor, ranks: int) -> torch.Tensor:
    """This rank's subtree of a tree product, float32 [..., N].

    x: [..., K / ranks], weight: [N, K / ranks]: the rank's slice of K, slices in rank order. ranks: 1, 2, 4 or 8.
    Add the ranks' results with `tree_all_reduce` (or `tensor_core.add_tree`): the sum, rounded, is matmul(..., order="tree").
    """
    arguments.require_size("ranks", ranks, TENSOR_PARALLEL_SIZES)
    _check(x, weight, "chain", "chain", torch.float32)
    leaves = TREE_LEAVES // ranks
    if x.shape[-1] % (16 * leaves):
        raise ValueError(f"x has K = {x.shape[-1]} on this rank; allowed: a multiple of {16 * leaves} for {ranks} ranks")
    return _product(x, weight, leaves, torch.float32)


def tree_all_reduce(partial: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, group: Any = None) -> torch.Tensor:
    """Add `tree_partial`s over the ranks of `group` as the tree goes on above them; every rank gets the sum in `out_dtype`.

    Each rank receives one slice of all partials, adds it, rounds it, and shares the result: float32 crosses the network once
    and `out_dtype` once. The network adds nothing, so its algorithm cannot show in the bits.
    """
    ranks = torch.distributed.get_world_size(group)
    arguments.require_size("the size of group", ranks, TENSOR_PARALLEL_SIZES)
    arguments.require_dtype("partial", partial, (torch.float32,))
    if ranks == 1:
        return partial.to(out_dtype)
    flat = partial.reshape(-1)
    slice_size = -(-flat.numel() // ranks)
    padded = torch.zeros(ranks * slice_size, device=partial.device)
    padded[: flat.numel()] = flat
    received = torch.empty_like(padded)
    torch.distributed.all_to_all_single(received, padded, group=group)
    mine = add_tree(list(received.view(ranks, slice_size).unbind(0))).to(out_dtype)
    gathered = torch.empty(ranks * slice_size, device=partial.device, dtype=out_dtype)
    torch.distributed.all_gather_into_tensor(gathered, mine, group=group)
    return gathered[: flat.numel()].view(partial.shape)


def matmul_reference(x: torch.Tensor, weight: torch.Tensor, leaves: int = 0) -> torch.Tensor:
    """The exact bits of the float32 accumulator on Hopper, in plain torch; slow, for small shapes."""
    rows = x.reshape(-1, x.shape[-1])
    total = mma_tree(rows, weight, leaves) if leaves else mma_chain(rows, weight)
    return total.view(*x.shape[:-1], weight.shape[0])


def require_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError unless x and weight are such as a product takes; their shapes are the caller's to compare."""
    arguments.require_dtype("x", x, DTYPES)
    arguments.require_dtype("weight", weight, (x.dtype,))
    arguments.require_dims("weight", weight, 2, "[N, K]")
    arguments.require_same_device(x=x, weight=weight)
    arguments.require_contiguous_rows("x", x)
    arguments.require_contiguous_rows("weight", weight)


def _check(x: torch.Tensor, weight: torch.Tensor, order: str, grad_order: str, out_dtype: torch.dtype | None) -> None:
    require_operands(x, weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [..., {weight.shape[1]}], weight's K")
    for name, value in (("order", order), ("grad_order", grad_order)):
        if value not in ORDERS:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(ORDERS)}")
    if order == "tree" and x.shape[-1] % (16 * TREE_LEAVES):
        raise ValueError(f"x has K = {x.shape[-1]} with order 'tree'; allowed: a multiple of {16 * TREE_LEAVES}")
    if grad_order == "tree" and weight.shape[0] % (16 * TREE_LEAVES):
        raise ValueError(f"weight has N = {weight.shape[0]} with grad_order 'tree'; allowed: a multiple of {16 * TREE_LEAVES}")
    if out_dtype is not None and out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}; allowed: {x.dtype}, torch.float32 or None")


def _product(x: torch.Tensor, weight: torch.Tensor, leaves: int, out_dtype: torch.dtype) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not runs_triton(x.device):
        return matmul_reference(x, weight, leaves).to(out_dtype)
    out = torch.empty(rows.shape[0], weight.shape[0], device=x.device, dtype=out_dtype)
    gemm(rows, weight, out, leaves=leaves)
    return out.view(*x.shape[:-1], weight.shape[0])


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, order: Order = "chain") -> torch.Tensor:
    """grad [rows, N] @ weight [N, K], summed over N by `order`; in weight's dtype."""
    leaves = TREE_LEAVES if order == "tree" else 0
    if not runs_triton(grad.device):
        return matmul_reference(grad, weight.T.contiguous(), leaves).to(weight.dtype)
    out = torch.empty(grad.shape[0], weight.shape[1], device=grad.device, dtype=weight.dtype)
    gemm(grad, weight, out, leaves=leaves, b_kn=True)
    return out


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """grad [rows, N]^T @ x [rows, K]: one chain over the rows in ascending order, [N, K]."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not runs_triton(grad.device):
        return mma_chain(grad.T.contiguous(), x.T.contiguous()).to(out_dtype)
    out = torch.empty(grad.shape[1], x.shape[1], device=grad.device, dtype=out_dtype)
    if grad.shape[0] == 0:
        return out.zero_()
    gemm(grad, x, out, a_km=True, b_kn=True)
    return out


class _Matmul(torch.autograd.Function):
    """matmul with both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, order: Order, grad_order: Order, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad_order = grad_order
        return _product(x, weight, TREE_LEAVES if order == "tree" else 0, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0]).to(x.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(grad, weight, ctx.grad_order).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(grad, x.reshape(-1, x.shape[-1]))
        return dx, dw, None, None, None
