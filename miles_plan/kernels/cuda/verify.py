"""Is every op invariant on this GPU? Random draws, bit for bit, in about a minute; the report names the op that differs first.

Each check draws a shape, a position and neighbours, computes one thing two ways that must agree (alone and in a batch, decode
and prefill, one rank and several, one tile and another), and counts the elements whose bits differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import attention as attention_module
from .attention import attention
from .device import multiprocessors
from .embedding import embedding
from .fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows, quantize_weight
from .gemm import TREE_LEAVES, gemm
from .grouped_matmul import grouped_matmul
from .log_prob import combine_log_prob, log_prob, log_prob_partials, log_softmax
from .matmul import Order, input_gradient, matmul, tree_partial, weight_gradient
from .moe_combine import moe_combine
from .rms_norm import rms_norm
from .rope import rope
from .router import router
from .sample import sample
from .swiglu import swiglu
from .tensor_core import add_tree
from .tuning import GemmProblem, candidates

HALF = (torch.bfloat16, torch.float16)


class Draw:
    """One random draw: a seeded generator on the device, and the choices a check makes with it."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.dice = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """A number in [low, high], small ones as likely as large ones."""
        span = math.log(high + 1) - math.log(max(low, 1))
        value = max(low, 1) * math.exp(float(torch.rand((), generator=self.dice)) * span)
        return min(high, max(low, int(value) - (1 if low == 0 else 0)))

    def pick(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return values[int(torch.randint(len(values), (), generator=self.dice))]

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Random normal values."""
        return (torch.randn(shape, device=self.device, generator=self.generator) * scale).to(dtype)

    def span(self, rows: int) -> slice:
        """Some consecutive rows, often few."""
        count = self.integer(1, rows)
        first = int(torch.randint(rows - count + 1, (), generator=self.dice))
        return slice(first, first + count)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Random integers in [low, high)."""
        return torch.randint(low, high, shape, device=self.device, generator=self.generator).to(dtype)


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements whose bits differ; NaNs with equal bits are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel(), 1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return int((a.contiguous().view(kind) != b.contiguous().view(kind)).sum())


def check_matmul_rows(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the same rows in a batch, by whatever tiles the tuner takes for each."""
    n, k = draw.pick([(256, 512), (1024, 1024), (768, 2048), (512, 4096), (2048, 768), (200, 1000)])
    x, weight = draw.normal(draw.integer(1, 700), k, dtype=dtype), draw.normal(n, k, dtype=dtype, scale=k**-0.5)
    rows = draw.span(x.shape[0])
    order: Order = draw.pick(["chain", "tree"]) if k % 128 == 0 else "chain"
    return differing(matmul(x, weight, order=order)[rows], matmul(x[rows], weight, order=order))


def check_matmul_tiles(draw: Draw, dtype: torch.dtype) -> int:
    """Two tiles of the tuner's list against each other, float32 results."""
    n, k, most = draw.pick([(512, 1024, 300), (384, 2048, 300), (6144, 768, 1500)])
    leaves = draw.pick([0, 0, TREE_LEAVES])
    problem = GemmProblem(draw.integer(1, most), n, k, dtype, torch.float32, leaves)
    x, weight = draw.normal(problem.m, k, dtype=dtype), draw.normal(n, k, dtype=dtype, scale=k**-0.5)
    tiles = candidates(problem, multiprocessors(draw.device))
    results = []
    for tile in (draw.pick(tiles), draw.pick(tiles)):
        out = torch.empty(problem.m, n, device=draw.device)
        gemm(x, weight, out, leaves=leaves, tile=tile)
        results.append(out)
    return differing(*results)


def check_matmul_ranks(draw: Draw, dtype: torch.dtype) -> int:
    """The tree product on 2, 4 and 8 simulated ranks against one."""
    n, k = draw.pick([(256, 1024), (512, 4096), (2048, 768)])
    x, weight = draw.normal(draw.integer(1, 300), k, dtype=dtype), draw.normal(n, k, dtype=dtype, scale=k**-0.5)
    whole = matmul(x, weight, order="tree")
    bad = 0
    for ranks in (2, 4, 8):
        width = k // ranks
        parts = [
            tree_partial(x[:, r * width : (r + 1) * width], weight[:, r * width : (r + 1) * width].contiguous(), ranks)
            for r in range(ranks)
        ]
        bad += differing(add_tree(parts).to(dtype), whole)
    return bad


def check_matmul_gradients(draw: Draw, dtype: torch.dtype) -> int:
    """dx of rows alone against the batch; dweight twice."""
    n, k = draw.pick([(256, 512), (1024, 1024)])
    x, weight = draw.normal(draw.integer(1, 500), k, dtype=dtype), draw.normal(n, k, dtype=dtype, scale=k**-0.5)
    grad = draw.normal(x.shape[0], n, dtype=dtype)
    rows = draw.span(x.shape[0])
    order = draw.pick(["chain", "tree"])
    bad = differing(input_gradient(grad, weight, order)[rows], input_gradient(grad[rows], weight, order))
    return bad + differing(weight_gradient(grad, x), weight_gradient(grad.clone(), x.clone()))


def _routed(draw: Draw, tokens: int, experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random routing: ids [tokens, slots], the rows' order by expert, and each expert's count."""
    ids = torch.rand(tokens, experts, device=draw.device, generator=draw.generator).topk(slots, -1).indices
    order = torch.argsort(ids.reshape(-1), stable=True)
    return ids, order, torch.bincount(ids.reshape(-1), minlength=experts).to(torch.int32)


def _expert_rows(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, product: Callable[..., torch.Tensor] = grouped_matmul
) -> torch.Tensor:
    """x through its experts: one row a (token, slot)."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=weight.shape[0]).to(torch.int32)
    rows = product(x.repeat_interleave(ids.shape[1], 0)[order], weight, counts)
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def check_grouped_rows(draw: Draw, dtype: torch.dtype) -> int:
    """Tokens alone against the batch, and experts split over 2 and 4 simulated ranks against one."""
    experts, n, k = draw.pick([(8, 256, 512), (32, 384, 256)])
    tokens = draw.integer(1, 600)
    x, weight = draw.normal(tokens, k, dtype=dtype), draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5)
    ids, _, _ = _routed(draw, tokens, experts, 2)
    whole = _expert_rows(x, weight, ids)
    rows = draw.span(tokens)
    bad = differing(_expert_rows(x[rows], weight, ids[rows]), whole.view(tokens, 2, n)[rows].reshape(-1, n))
    ranks = draw.pick([2, 4])
    share = experts // ranks
    for rank in range(ranks):
        mine = (ids.reshape(-1) // share) == rank
        local = ids.reshape(-1)[mine] - rank * share
        part = _expert_rows(
            x.repeat_interleave(2, 0)[mine], weight[rank * share : (rank + 1) * share].contiguous(), local[:, None]
        )
        bad += differing(part, whole[mine])
    return bad


def check_grouped_gradients(draw: Draw, dtype: torch.dtype) -> int:
    """dx of one expert's rows with and without the other experts' rows; dweight twice."""
    experts, n, k = 8, 256, 512
    counts = draw.ints(0, 90, experts, dtype=torch.int32)
    rows = int(counts.sum())
    x = draw.normal(rows, k, dtype=dtype).requires_grad_()
    weight = draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5).requires_grad_()
    grad = draw.normal(rows, n, dtype=dtype)
    dx, dw = torch.autograd.grad(grouped_matmul(x, weight, counts), (x, weight), grad)
    expert = draw.integer(0, experts - 1)
    first, count = int(counts[:expert].sum()), int(counts[expert])
    alone = torch.zeros_like(counts)
    alone[expert] = count
    mine = x.detach()[first : first + count].requires_grad_()
    lone_dx, lone_dw = torch.autograd.grad(grouped_matmul(mine, weight, alone), (mine, weight), grad[first : first + count])
    return differing(lone_dx, dx[first : first + count]) + differing(lone_dw[expert], dw[expert])


def check_combine(draw: Draw, dtype: torch.dtype) -> int:
    """Tokens alone against the batch."""
    tokens, slots, width = draw.integer(1, 400), draw.pick([1, 2, 8]), draw.pick([256, 1000, 2048])
    rows = draw.normal(tokens * slots, width, dtype=dtype)
    index = torch.randperm(tokens * slots, device=draw.device, generator=draw.generator).to(torch.int32).view(tokens, slots)
    weights = draw.normal(tokens, slots, dtype=torch.float32)
    some = draw.span(tokens)
    return differing(
        moe_combine(rows, index, weights)[some], moe_combine(rows, index[some].contiguous(), weights[some].contiguous())
    )


def check_router(draw: Draw, dtype: torch.dtype) -> int:
    """Tokens alone against the batch, with ties on purpose."""
    tokens, experts = draw.integer(1, 400), draw.pick([8, 128, 256])
    logits = (draw.normal(tokens, experts, dtype=torch.float32) * 4).round() / 4
    rows = draw.span(tokens)
    scoring = draw.pick(["softmax", "sigmoid"])
    whole, alone = router(logits, 4, scoring=scoring), router(logits[rows].contiguous(), 4, scoring=scoring)
    return differing(whole[0][rows], alone[0]) + differing(whole[1][rows], alone[1])


def check_attention(draw: Draw, dtype: torch.dtype) -> int:
    """A sequence in a ragged batch against decode steps, chunks and pages of it alone."""
    d, dv, heads, kv_heads = draw.pick([(128, 128, 8, 2), (64, 64, 14, 2), (128, 128, 4, 4), (192, 128, 4, 4)])
    lens = [draw.integer(1, 2500) for _ in range(draw.integer(1, 4))]
    window = draw.pick([None, None, 300])
    total = sum(lens)
    q, k = draw.normal(total, heads, d, dtype=dtype), draw.normal(total, kv_heads, d, dtype=dtype)
    v = draw.normal(total, kv_heads, dv, dtype=dtype)
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], device=draw.device, dtype=torch.int32)
    whole = attention(q, k, v, q_starts=starts, max_q_len=max(lens), window=window)
    which = draw.integer(0, len(lens) - 1)
    first, length = int(starts[which]), lens[which]
    rows = draw.span(length)
    here = slice(first + rows.start, first + rows.stop)
    part = {"q_starts": _ints(draw, 0, rows.stop - rows.start), "kv_lens": _ints(draw, rows.stop), "window": window}
    sizes = {"max_q_len": rows.stop - rows.start, "max_kv_len": rows.stop}
    bad = differing(attention(q[here], k[first:], v[first:], **part, **sizes), whole[here])
    page = draw.pick([16, 64, 256])
    k_pages, table = _paged(draw, k[first : first + rows.stop], page)
    v_pages, _ = _paged(draw, v[first : first + rows.stop], page, table)
    return bad + differing(attention(q[here], k_pages, v_pages, page_table=table, **part, **sizes), whole[here])


def _ints(draw: Draw, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=draw.device, dtype=torch.int32)


def _paged(draw: Draw, x: torch.Tensor, page: int, table: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values scattered over pages, what no key fills being NaN."""
    pages = -(-x.shape[0] // page)
    if table is None:
        table = torch.randperm(pages + 3, device=draw.device, generator=draw.generator)[None, :pages].to(torch.int32)
    out = torch.full((pages + 3, page, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype)
    padded = torch.full((pages * page, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype)
    padded[: x.shape[0]] = x
    out[table[0].long()] = padded.view(pages, page, *x.shape[1:])
    return out, table


def check_decode(draw: Draw, dtype: torch.dtype) -> int:
    """A ragged batch of decode steps against each alone, split and whole."""
    lens = [draw.integer(1, 6000) for _ in range(draw.integer(2, 40))]
    heads, kv_heads, d = draw.pick([(8, 2, 128), (16, 2, 128), (8, 8, 64)])
    total = sum(lens)
    q, k, v = (draw.normal(n, h, d, dtype=dtype) for n, h in ((len(lens), heads), (total, kv_heads), (total, kv_heads)))
    starts = torch.arange(len(lens) + 1, device=draw.device, dtype=torch.int32)
    whole = attention(q, k, v, q_starts=starts, kv_lens=_ints(draw, *lens), max_q_len=1, max_kv_len=max(lens))
    which = draw.integer(0, len(lens) - 1)
    first = sum(lens[:which])
    shared = {"q_starts": _ints(draw, 0, 1), "kv_lens": _ints(draw, lens[which]), "max_q_len": 1, "max_kv_len": lens[which]}
    bad = 0
    keep = attention_module.SPLIT_BELOW
    for attention_module.SPLIT_BELOW in (0, 10**9):
        alone = attention(q[which : which + 1], k[first:], v[first:], **shared)  # type: ignore[arg-type]  # keywords of several types
        bad += differing(alone, whole[which : which + 1])
    attention_module.SPLIT_BELOW = keep
    return bad


def check_attention_gradients(draw: Draw, dtype: torch.dtype) -> int:
    """Gradients of a sequence in a batch against the sequence alone."""
    heads, kv_heads, d = draw.pick([(4, 2, 64), (4, 1, 128)])
    lens = [draw.integer(1, 500) for _ in range(3)]
    q, k, v = (draw.normal(sum(lens), h, d, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    starts = _ints(draw, 0, lens[0], lens[0] + lens[1], sum(lens))
    grad = draw.normal(sum(lens), heads, d, dtype=dtype)
    whole = torch.autograd.grad(attention(q, k, v, q_starts=starts), (q, k, v), grad)
    here = slice(lens[0], lens[0] + lens[1])
    mine = [x.detach()[here].requires_grad_() for x in (q, k, v)]
    alone = torch.autograd.grad(attention(*mine), mine, grad[here])
    return sum(differing(a, b[here]) for a, b in zip(alone, whole, strict=True))


def check_rms_norm(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the batch, with a residual."""
    rows, width = draw.integer(1, 500), draw.pick([64, 128, 1000, 2048, 4096])
    x, residual, weight = (draw.normal(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    some = draw.span(rows)
    whole, alone = rms_norm(x, weight, 1e-6, residual), rms_norm(x[some], weight, 1e-6, residual[some])
    return sum(differing(a[some], b) for a, b in zip(whole, alone, strict=True))


def check_rope(draw: Draw, dtype: torch.dtype) -> int:
    """Tokens and heads alone against the batch, with the per-head norm."""
    tokens, heads, d = draw.integer(1, 300), draw.pick([8, 32]), draw.pick([64, 128])
    q, k = draw.normal(tokens, heads, d, dtype=dtype), draw.normal(tokens, 4, d, dtype=dtype)
    cos, sin = (draw.normal(4096, d // 2, dtype=torch.float32) for _ in range(2))
    positions = draw.ints(0, 4096, tokens)
    q_norm, k_norm = draw.normal(d, dtype=dtype), draw.normal(d, dtype=dtype)
    some = draw.span(tokens)
    whole = rope(q, k, cos, sin, positions, q_norm=q_norm, k_norm=k_norm)
    alone = rope(q[some], k[some], cos, sin, positions[some], q_norm=q_norm, k_norm=k_norm)
    bad = sum(differing(a[some], b) for a, b in zip(whole, alone, strict=True))
    ranks = draw.pick([2, 4])
    for rank in range(ranks):
        q_heads, k_heads = (slice(rank * h // ranks, (rank + 1) * h // ranks) for h in (heads, 4))
        part = rope(q[:, q_heads], k[:, k_heads], cos, sin, positions, q_norm=q_norm, k_norm=k_norm)
        bad += differing(part[0], whole[0][:, q_heads]) + differing(part[1], whole[1][:, k_heads])
    return bad


def check_swiglu(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the batch."""
    rows, width = draw.integer(1, 300), draw.pick([96, 768, 3072])
    x = draw.normal(rows, 2 * width, dtype=dtype)
    some = draw.span(rows)
    return differing(swiglu(x)[some], swiglu(x[some]))


def check_embedding(draw: Draw, dtype: torch.dtype) -> int:
    """Shards added up against the whole table; the gradient twice."""
    rows, width = 512, draw.pick([64, 1024])
    weight = draw.normal(rows, width, dtype=dtype).abs().requires_grad_()
    ids = draw.ints(0, rows, draw.integer(1, 300))
    out = embedding(ids, weight)
    ranks = draw.pick([2, 4, 8])
    share = rows // ranks
    shards = [embedding(ids, weight.detach()[r * share : (r + 1) * share], r * share) for r in range(ranks)]
    grad = draw.normal(*out.shape, dtype=dtype)
    first = torch.autograd.grad(out, weight, grad, retain_graph=True)[0]
    second = torch.autograd.grad(out, weight, grad)[0]
    return differing(torch.stack(shards).sum(0), out.detach()) + differing(first, second)


def check_log_prob(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the batch, 2 to 8 simulated ranks against one, and log_softmax's column."""
    rows, vocab = draw.integer(1, 40), draw.pick([16_000, 32_000, 151_936, 50_257])
    logits = draw.normal(rows, vocab, dtype=dtype, scale=4.0)
    targets = draw.ints(0, vocab, rows)
    some = draw.span(rows)
    whole = log_prob(logits, targets, temperature=0.9)
    bad = differing(whole[some], log_prob(logits[some], targets[some], temperature=0.9))
    table = log_softmax(logits, temperature=0.9).gather(1, targets[:, None])[:, 0]
    bad += differing(table, whole)
    if vocab % 16 == 0:
        ranks = draw.pick([2, 4, 8])
        width = vocab // ranks
        parts = [log_prob_partials(logits[:, r * width : (r + 1) * width].contiguous(), vocab, 0.9) for r in range(ranks)]
        m, s = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
        chosen = logits.gather(1, targets[:, None])[:, 0].float()
        bad += differing(combine_log_prob(m, s, chosen, 0.9)[0], whole)
    return bad


def check_sample(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the batch."""
    rows, vocab = draw.integer(1, 60), draw.pick([1000, 32_000])
    logits, seeds = draw.normal(rows, vocab, dtype=dtype, scale=2.0), draw.ints(0, 2**62, rows)
    positions = draw.ints(0, 2**33, rows)
    some = draw.span(rows)
    options = draw.pick([{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}])
    whole = sample(logits, seeds, positions, **options)
    return differing(whole[some], sample(logits[some], seeds[some], positions[some], **options))


def check_fp8(draw: Draw, dtype: torch.dtype) -> int:
    """Rows alone against the batch, plain and grouped."""
    n, k, experts = draw.pick([(512, 1024, 8), (1024, 512, 16)])
    tokens = draw.integer(1, 600)
    x, weight = draw.normal(tokens, k, dtype=dtype), draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5)
    rows = draw.span(tokens)
    (values, scales), (w, w_scale) = quantize_rows(x), quantize_weight(weight)
    alone = quantize_rows(x[rows])
    bad = differing(values[rows].view(torch.uint8), alone[0].view(torch.uint8)) + differing(scales[rows], alone[1])
    whole = fp8_matmul(values, scales, w[0], w_scale[0])
    bad += differing(whole[rows], fp8_matmul(*alone, w[0], w_scale[0]))
    ids, _, _ = _routed(draw, tokens, experts, 2)

    def product(x_rows: torch.Tensor, _: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return fp8_grouped_matmul(*quantize_rows(x_rows), w, w_scale, counts)

    grouped = _expert_rows(x, weight, ids, product).view(tokens, 2, n)
    return bad + differing(_expert_rows(x[rows], weight, ids[rows], product), grouped[rows].reshape(-1, n))


@dataclass(frozen=True)
class Check:
    """A check and the dtypes it runs in."""

    name: str
    run: Callable[[Draw, torch.dtype], int]
    dtypes: tuple[torch.dtype, ...] = HALF


CHECKS = (
    Check("matmul rows", check_matmul_rows, (*HALF, torch.float32)),
    Check("matmul tiles", check_matmul_tiles),
    Check("matmul tensor parallel", check_matmul_ranks),
    Check("matmul gradients", check_matmul_gradients),
    Check("grouped_matmul", check_grouped_rows),
    Check("grouped_matmul gradients", check_grouped_gradients),
    Check("moe_combine", check_combine, (*HALF, torch.float32)),
    Check("router", check_router, (torch.float32,)),
    Check("attention", check_attention),
    Check("attention decode", check_decode),
    Check("attention gradients", check_attention_gradients),
    Check("rms_norm", check_rms_norm, (*HALF, torch.float32)),
    Check("rope", check_rope, (*HALF, torch.float32)),
    Check("swiglu", check_swiglu, (*HALF, torch.float32)),
    Check("embedding", check_embedding, (*HALF, torch.float32)),
    Check("log_prob", check_log_prob, (*HALF, torch.float32)),
    Check("sample", check_sample, (*HALF, torch.float32)),
    Check("fp8", check_fp8, (torch.bfloat16,)),
)


@dataclass
class OpReport:
    """What the draws of one check and dtype showed."""

    op: str
    dtype: str
    draws: int = 0
    differing_draws: int = 0
    differing_elements: int = 0
    first_seed: int | None = None  # the seed of the first draw that differed
    error: str | None = None

    @property
    def ok(self) -> bool:
        """No draw differed and none failed."""
        return self.differing_draws == 0 and self.error is None


@dataclass
class Report:
    """The result of `verify`."""

    gpu: str
    torch_version: str
    triton_version: str
    seconds: float = 0.0
    ops: list[OpReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every op is invariant."""
        return all(op.ok for op in self.ops)

    @property
    def first(self) -> OpReport | None:
        """The first op, in the order of a forward pass, that is not."""
        return next((op for op in self.ops if not op.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{self.gpu}, torch {self.torch_version}, triton {self.triton_version}, {self.seconds:.0f} s"]
        for op in self.ops:
            word = "ok" if op.ok else "DIFFERS" if op.error is None else f"FAILED: {op.error}"
            lines.append(f"{op.op:26s} {op.dtype:9s} {op.draws:6d} draws  {word}")
            if op.differing_draws:
                lines.append(
                    f"  {op.differing_elements} elements in {op.differing_draws} draws, first with seed {op.first_seed}"
                )
        first = self.first
        lines.append("every op is invariant" if first is None else f"first to differ: {first.op} ({first.dtype})")
        return "\n".join(lines)


def verify(seconds: float = 60.0, seed: int = 0, device: str = "cuda", least_draws: int = 3) -> Report:
    """Run every check in turn until `seconds` have passed, each at least `least_draws` times; kernels compile on first use.

    Raises ValueError if there is no such device.
    """
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}; allowed: a CUDA device that is there")
    import triton

    report = Report(torch.cuda.get_device_name(where), torch.__version__, triton.__version__)
    pairs = [(check, dtype) for check in CHECKS for dtype in check.dtypes]
    report.ops = [OpReport(check.name, str(dtype).removeprefix("torch.")) for check, dtype in pairs]
    begin, turn = time.monotonic(), 0
    while turn < least_draws or time.monotonic() - begin < seconds:
        for (check, dtype), op in zip(pairs, report.ops, strict=True):
            if op.error is None and (turn < least_draws or time.monotonic() - begin < seconds):
                _draw_once(check, dtype, op, seed + turn, where)
        turn += 1
    report.seconds = time.monotonic() - begin
    return report


def _draw_once(check: Check, dtype: torch.dtype, op: OpReport, seed: int, where: torch.device) -> None:
    try:
        bad = check.run(Draw(seed, where), dtype)
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        op.error = f"{type(error).__name__}: {error} (seed {seed})"
        return
    op.draws += 1
    if bad:
        op.differing_draws += 1
        op.differing_elements += bad
        op.first_seed = seed if op.first_seed is None else op.first_seed
