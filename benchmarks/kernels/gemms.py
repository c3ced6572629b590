"""Timing and checking the matrix products: chain, tree, gradients, experts, FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch

from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows, quantize_weight
from miles_plan.kernels.cuda.gemm import TREE_LEAVES
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.matmul import input_gradient, matmul, weight_gradient
from miles_plan.kernels.cuda.tuning import GemmProblem, table_for

from .record import OURS, Record, relative_error
from .shapes import Shape
from .timing import Call, copies, time_side_by_side

DEVICE = "cuda"
CHECKED_ROWS = 64  # rows and columns that are compared with float64
CHECKED_COLUMNS = 512


def library(name: str) -> Call:
    """Selects which library torch.mm uses while a graph is captured."""
    return lambda: torch.backends.cuda.preferred_blas_library(name)


LIBRARIES = {"cublas": library("cublas"), "cublaslt": library("cublaslt")}


def _normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32 if dtype == torch.float32 else dtype).mul_(scale)


def _some_rows(rows: int) -> slice:
    """A few rows from the middle: alone they take other tiles than the batch."""
    count = max(1, min(3, rows // 2))
    return slice(rows // 3, rows // 3 + count)


def measure_matmul(shape: Shape) -> Record:
    """One product against the faster of cuBLAS and cuBLASLt without workspace."""
    m, n, k, order = shape["M"], shape["N"], shape["K"], shape["order"]
    dtype = getattr(torch, shape["dtype"])
    weights = [_normal(n, k, dtype=dtype, scale=k**-0.5) for _ in range(copies(n * k * dtype.itemsize))]
    x = _normal(m, k, dtype=dtype)
    out = torch.empty(m, n, device=DEVICE, dtype=dtype)
    contenders: dict[str, list[Call]] = {OURS: [lambda w=w: matmul(x, w, order=order) for w in weights]}  # type: ignore[misc]  # a default binds the loop's value
    for name in LIBRARIES:
        contenders[name] = [lambda w=w: torch.mm(x, w.t(), out=out) for w in weights]  # type: ignore[misc]  # likewise
    record = Record(shape, time_side_by_side(contenders, before=LIBRARIES), flop=2.0 * m * n * k)
    whole, rows = matmul(x, weights[0], order=order), _some_rows(m)
    record.same_bits = torch.equal(whole[rows], matmul(x[rows], weights[0], order=order))
    problem = GemmProblem(m, n, k, dtype, dtype, leaves=TREE_LEAVES if order == "tree" else 0)
    record.tuned = table_for(torch.cuda.get_device_name()).get(problem) is not None
    exact = x[:CHECKED_ROWS].double() @ weights[0][:CHECKED_COLUMNS].double().T
    theirs = torch.mm(x, weights[0].t())
    record.error = relative_error(whole[:CHECKED_ROWS, :CHECKED_COLUMNS], exact)
    record.baseline_error = relative_error(theirs[:CHECKED_ROWS, :CHECKED_COLUMNS], exact)
    return record


def measure_gradients(shape: Shape) -> Record:
    """Both gradients of one product, together, against cuBLAS."""
    m, n, k, order = shape["M"], shape["N"], shape["K"], shape["grad_order"]
    dtype = getattr(torch, shape["dtype"])
    weight, x, grad = _normal(n, k, dtype=dtype, scale=k**-0.5), _normal(m, k, dtype=dtype), _normal(m, n, dtype=dtype)

    def ours() -> None:
        input_gradient(grad, weight, order)
        weight_gradient(grad, x)

    def theirs() -> None:
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    contenders: dict[str, list[Call]] = {OURS: [ours], **{name: [theirs] for name in LIBRARIES}}
    record = Record(shape, time_side_by_side(contenders, before=LIBRARIES), flop=4.0 * m * n * k)
    rows = _some_rows(m)
    record.same_bits = torch.equal(input_gradient(grad, weight, order)[rows], input_gradient(grad[rows], weight, order))
    record.same_bits &= torch.equal(weight_gradient(grad, x), weight_gradient(grad, x))
    exact = grad[:, :CHECKED_ROWS].double().T @ x[:, :CHECKED_COLUMNS].double()
    record.error = relative_error(weight_gradient(grad, x)[:CHECKED_ROWS, :CHECKED_COLUMNS], exact)
    record.baseline_error = relative_error(torch.mm(grad.t(), x)[:CHECKED_ROWS, :CHECKED_COLUMNS], exact)
    return record


def _route(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each expert under random routing, and for the check the first row of the busiest expert and its number."""
    ids = torch.rand(tokens, experts, device=DEVICE).topk(top_k, -1).indices.reshape(-1)
    counts = torch.bincount(ids, minlength=experts).int()
    return counts, torch.cumsum(counts, 0).int()


def _grouped_bits(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, counts: torch.Tensor, whole: torch.Tensor
) -> bool:
    """One row of the busiest expert alone against the batch."""
    busiest = int(counts.argmax())
    row = int(counts[:busiest].sum()) + int(counts[busiest]) // 2
    alone = torch.zeros_like(counts)
    alone[busiest] = 1
    return torch.equal(product(x[row : row + 1], alone), whole[row : row + 1])


def measure_grouped(shape: Shape) -> Record:
    """Expert products against torch._grouped_mm and, where it is installed, DeepGEMM."""
    tokens, n, k, experts, top_k = (shape[name] for name in ("tokens", "N", "K", "experts", "top_k"))
    dtype = getattr(torch, shape["dtype"])
    weight, x = _normal(experts, n, k, dtype=dtype, scale=k**-0.5), _normal(tokens * top_k, k, dtype=dtype)
    counts, ends = _route(tokens, experts, top_k)
    contenders: dict[str, list[Call]] = {OURS: [lambda: grouped_matmul(x, weight, counts)]}
    if dtype == torch.bfloat16:
        contenders["torch"] = [lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)]
        deep_gemm = _deep_gemm_call(x, weight, counts)
        if deep_gemm is not None:
            contenders["deep_gemm"] = [deep_gemm]
    record = Record(shape, time_side_by_side(contenders), flop=2.0 * tokens * top_k * n * k)
    whole = grouped_matmul(x, weight, counts)
    record.same_bits = _grouped_bits(lambda rows, alone: grouped_matmul(rows, weight, alone), x, counts, whole)
    first = int(counts[0])
    if first:
        exact = x[:first].double() @ weight[0].double().T
        record.error = relative_error(whole[:first], exact)
        if "torch" in contenders:
            theirs = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
            record.baseline_error = relative_error(theirs[:first], exact)
    return record


def _deep_gemm_call(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> Call | None:
    """DeepGEMM's contiguous grouped product on rows padded to its alignment; padding is not timed."""
    try:
        import deep_gemm
    except ImportError:
        return None
    align = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
    padded = (counts.long() + align - 1) // align * align
    rows = int(padded.sum())
    expert = torch.repeat_interleave(torch.arange(counts.numel(), device=DEVICE), padded)
    start = torch.cumsum(padded, 0) - padded
    place = torch.arange(rows, device=DEVICE) - start[expert]
    real = place < counts[expert]
    spread = torch.zeros(rows, x.shape[1], device=DEVICE, dtype=x.dtype)
    spread[real] = x
    index = torch.where(real, expert, -1).int()
    out = torch.empty(rows, weight.shape[1], device=DEVICE, dtype=x.dtype)

    def call() -> None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(spread, weight, out, index)

    call()
    return call


def measure_fp8(shape: Shape) -> Record:
    """The block-scaled FP8 product (operands already FP8) against torch's, where it has one, and against bf16 cuBLAS."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    weight, x = _normal(n, k, dtype=torch.bfloat16, scale=k**-0.5), _normal(m, k, dtype=torch.bfloat16)
    values, scales = quantize_rows(x)
    pairs = [quantize_weight(weight)]
    pairs += [(pairs[0][0].clone(), pairs[0][1].clone()) for _ in range(copies(n * k) - 1)]
    many = [weight, *[weight.clone() for _ in range(copies(n * k * 2) - 1)]]
    contenders: dict[str, list[Call]] = {
        OURS: [lambda w=w, s=s: fp8_matmul(values, scales, w, s) for w, s in pairs],  # type: ignore[misc]  # a default binds the loop's value
        "cublas bf16": [lambda w=w: torch.mm(x, w.t()) for w in many],  # type: ignore[misc]  # likewise
    }
    theirs = _scaled_mm_call(values, scales, *pairs[0])
    if theirs is not None:
        contenders["torch fp8"] = [theirs]
    record = Record(shape, time_side_by_side(contenders, before={"cublas bf16": LIBRARIES["cublas"]}), flop=2.0 * m * n * k)
    whole, rows = fp8_matmul(values, scales, *pairs[0]), _some_rows(m)
    record.same_bits = torch.equal(whole[rows], fp8_matmul(*quantize_rows(x[rows]), *pairs[0]))
    # Against the float64 product of what the FP8 operands stand for: the kernel's own error, not the format's.
    exact = _dequantized(values[:CHECKED_ROWS], scales[:CHECKED_ROWS]) @ _dequantized_weight(*pairs[0])[:CHECKED_COLUMNS].T
    record.error = relative_error(whole[:CHECKED_ROWS, :CHECKED_COLUMNS], exact)
    return record


def _scaled_mm_call(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> Call | None:
    """torch._scaled_mm with the same block scales, or None where this build cannot."""
    rows_first = scales.t().contiguous().t()
    w, w_scales = weight.t(), weight_scales.t()

    def call() -> torch.Tensor:
        return torch._scaled_mm(values, w, rows_first, w_scales, out_dtype=torch.bfloat16)

    try:
        call()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError):
        return None
    return call


def _dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return values.double() * scales.double().repeat_interleave(128, -1)


def _dequantized_weight(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows = scales.double().repeat_interleave(128, -2)[: values.shape[0]]
    return values.double() * rows.repeat_interleave(128, -1)


def measure_fp8_grouped(shape: Shape) -> Record:
    """Block-scaled FP8 expert products against bf16 torch._grouped_mm."""
    tokens, n, k, experts, top_k = (shape[name] for name in ("tokens", "N", "K", "experts", "top_k"))
    weight, x = _normal(experts, n, k, dtype=torch.bfloat16, scale=k**-0.5), _normal(tokens * top_k, k, dtype=torch.bfloat16)
    counts, ends = _route(tokens, experts, top_k)
    values, scales = quantize_rows(x)
    w, w_scales = quantize_weight(weight)
    contenders: dict[str, list[Call]] = {
        OURS: [lambda: fp8_grouped_matmul(values, scales, w, w_scales, counts)],
        "torch bf16": [lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)],
    }
    record = Record(shape, time_side_by_side(contenders), flop=2.0 * tokens * top_k * n * k)
    whole = fp8_grouped_matmul(values, scales, w, w_scales, counts)

    def product(rows: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
        return fp8_grouped_matmul(*quantize_rows(rows), w, w_scales, alone)

    record.same_bits = _grouped_bits(product, x, counts, whole)
    return record
