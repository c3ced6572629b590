"""What must agree bit for bit, op by op: each check draws a shape, positions and neighbours, and computes one thing two ways.

Alone and in a batch, decode and prefill, one rank and several, one tile and another, one cut of a prefill and another. The
names are the ops' in the order of a forward pass. `verify` runs them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .device import multiprocessors
from .draw import Draw
from .embedding import embedding
from .expert_rows import expert_order, expert_rows
from .fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows, quantize_weight
from .gemm import TREE_LEAVES, gemm
from .grouped_matmul import grouped_matmul
from .invariance_of_attention import check_attention, check_decode, check_gradients, check_other_heads
from .linear_log_prob import linear_log_prob
from .log_prob import combine_log_prob, log_prob, log_prob_partials, log_softmax
from .matmul import Order, input_gradient, matmul, tree_partial, weight_gradient
from .moe_combine import moe_combine
from .parallel_linear import partial_input_gradient
from .rms_norm import rms_norm
from .rope import rope
from .router import Scoring, router
from .sample import sample
from .swiglu import swiglu
from .tensor_core import add_tree
from .tuning import GemmProblem, candidates
from .vocab_scores import row_statistics, scores_gradient

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
RANKS = (2, 4, 8)


def _weight(draw: Draw, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return draw.values(n, k, dtype=dtype, scale=k**-0.5)


def _rows(rows: slice, of: int) -> str:
    return f"rows {rows.start}:{rows.stop} of {of}"


def check_matmul_rows(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the same rows in a batch, by whatever tiles the tuner takes for each."""
    n, k, most = draw.pick(
        [
            (256, 512, 65_536), (1024, 1024, 700), (768, 2048, 9000), (512, 4096, 700), (256, 8192, 700), (128, 16_384, 700),
            (200, 1000, 3000), (384, 1408, 3000), (328, 40, 3000), (50, 999, 700),
        ]
    )  # fmt: skip
    tokens = draw.integer(1, most)
    x, weight = draw.values(tokens, k, dtype=dtype), _weight(draw, n, k, dtype)
    order: Order = draw.pick(("chain", "tree")) if k % 128 == 0 else "chain"
    whole = matmul(x, weight, order=order)
    for rows in draw.spans(tokens):
        draw.compare(whole[rows], matmul(x[rows], weight, order=order), f"{_rows(rows, tokens)}, N={n}, K={k}, order={order}")


def check_matmul_tiles(draw: Draw, dtype: torch.dtype) -> None:
    """Tiles of the tuner's list against each other, forward and gradients, rounded results (which leave in three ways) and float32
    ones."""
    n, k, most = draw.pick(
        [(512, 1024, 300), (384, 2048, 300), (6144, 768, 1500), (1024, 3584, 600), (2304, 640, 1500), (512, 1408, 900)]
    )
    leaves, lying = draw.pick([(0, "nt"), (TREE_LEAVES, "nt"), (0, "nn"), (TREE_LEAVES, "nn"), (0, "tn")])
    out_dtype = draw.pick([dtype, dtype, torch.float32])
    tokens = draw.integer(1, most)
    m, summed = (k, tokens) if lying == "tn" else (tokens, k)
    problem = GemmProblem(m, n, summed, dtype, out_dtype, leaves, a_km=lying[0] == "t", b_kn=lying[1] == "n")
    a = draw.values(*((summed, m) if problem.a_km else (m, summed)), dtype=dtype)
    b = draw.values(*((summed, n) if problem.b_kn else (n, summed)), dtype=dtype, scale=summed**-0.5)
    tiles = candidates(problem, multiprocessors(draw.device))
    first = draw.pick(tiles)
    want = torch.empty(m, n, device=draw.device, dtype=out_dtype)
    gemm(a, b, want, leaves=leaves, a_km=problem.a_km, b_kn=problem.b_kn, tile=first)
    for _ in range(3):
        other = draw.pick(tiles)
        out = torch.empty_like(want)
        gemm(a, b, out, leaves=leaves, a_km=problem.a_km, b_kn=problem.b_kn, tile=other)
        draw.compare(want, out, f"{problem.key}, {tokens} tokens, {first} against {other}")


def check_matmul_ranks(draw: Draw, dtype: torch.dtype) -> None:
    """The tree product, and the gradient of a column-parallel layer's input, on 2, 4 and 8 simulated ranks against one."""
    n, k = draw.pick([(256, 1024), (512, 4096), (2048, 768), (1408, 1408)])
    tokens = draw.integer(1, 300)
    x, weight, grad = draw.values(tokens, k, dtype=dtype), _weight(draw, n, k, dtype), draw.values(tokens, n, dtype=dtype)
    whole, whole_gradient = matmul(x, weight, order="tree"), input_gradient(grad, weight, "tree")
    for ranks in RANKS:
        parts, gradients = [], []
        for rank in range(ranks):
            columns, some = slice(rank * k // ranks, (rank + 1) * k // ranks), slice(rank * n // ranks, (rank + 1) * n // ranks)
            parts.append(tree_partial(x[:, columns], weight[:, columns].contiguous(), ranks))
            gradients.append(partial_input_gradient(grad[:, some].contiguous(), weight[some], ranks))
        label = f"M={tokens}, N={n}, K={k}, {ranks} ranks"
        draw.compare(add_tree(parts).to(dtype), whole, label)
        draw.compare(add_tree(gradients).to(dtype), whole_gradient, f"{label}, gradient of x")


def check_matmul_gradients(draw: Draw, dtype: torch.dtype) -> None:
    """dx of rows alone against the batch; dweight twice."""
    n, k = draw.pick([(256, 512), (1024, 1024), (1408, 328), (200, 999)])
    tokens = draw.integer(1, 500)
    x, weight, grad = draw.normal(tokens, k, dtype=dtype), _weight(draw, n, k, dtype), draw.normal(tokens, n, dtype=dtype)
    order: Order = draw.pick(("chain", "tree")) if n % 128 == 0 else "chain"
    whole = input_gradient(grad, weight, order)
    for rows in draw.spans(tokens, 4):
        draw.compare(
            whole[rows], input_gradient(grad[rows], weight, order), f"dx, {_rows(rows, tokens)}, N={n}, K={k}, {order}"
        )
    draw.compare(weight_gradient(grad, x), weight_gradient(grad.clone(), x.clone()), f"dweight twice, M={tokens}, N={n}, K={k}")


def _through_experts(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, product: Callable[..., torch.Tensor] = grouped_matmul
) -> torch.Tensor:
    """x through its experts, [tokens, slots, N]."""
    order = expert_order(ids, weight.shape[0])
    rows = product(expert_rows(x, order), weight, order.counts)
    return rows[order.place.flatten().long()].view(*ids.shape, weight.shape[1])


def _routed(draw: Draw, tokens: int, experts: int) -> torch.Tensor:
    return draw.normal(tokens, experts, dtype=torch.float32).topk(2, -1).indices


def check_grouped_rows(draw: Draw, dtype: torch.dtype) -> None:
    """Tokens alone against the batch, and experts split over 2 and 4 simulated ranks against one."""
    experts, n, k = draw.pick([(8, 256, 512), (32, 384, 256), (4, 200, 328), (128, 128, 256)])
    tokens = draw.integer(1, 600)
    x = draw.values(tokens, k, dtype=dtype)
    weight = draw.values(experts, n, k, dtype=dtype, scale=k**-0.5)
    ids = _routed(draw, tokens, experts)
    whole = _through_experts(x, weight, ids)
    label = f"{experts} experts, N={n}, K={k}"
    for rows in draw.spans(tokens, 4):
        draw.compare(whole[rows], _through_experts(x[rows], weight, ids[rows]), f"{_rows(rows, tokens)}, {label}")
    for ranks in (2, 4):
        share = experts // ranks
        for rank in range(ranks):
            token, slot = ((ids // share) == rank).nonzero(as_tuple=True)
            mine = weight[rank * share : (rank + 1) * share].contiguous()
            part = _through_experts(x[token], mine, (ids[token, slot] - rank * share)[:, None])
            draw.compare(part[:, 0], whole[token, slot], f"rank {rank} of {ranks}, {tokens} tokens, {label}")


def check_grouped_gradients(draw: Draw, dtype: torch.dtype) -> None:
    """Gradients of one expert's rows and weight with and without the other experts' rows."""
    experts, n, k = draw.pick([(8, 256, 512), (4, 384, 328)])
    counts = draw.ints(0, 90, experts, dtype=torch.int32)
    rows = int(counts.sum())
    x = draw.normal(rows, k, dtype=dtype).requires_grad_()
    weight = draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5).requires_grad_()
    grad = draw.normal(rows, n, dtype=dtype)
    dx, dw = torch.autograd.grad(grouped_matmul(x, weight, counts), (x, weight), grad)
    expert = draw.integer(0, experts - 1)
    first, count = int(counts[:expert].sum()), int(counts[expert])
    here = slice(first, first + count)
    alone = torch.zeros_like(counts)
    alone[expert] = count
    mine = x.detach()[here].requires_grad_()
    lone_dx, lone_dw = torch.autograd.grad(grouped_matmul(mine, weight, alone), (mine, weight), grad[here])
    label = f"expert {expert} of {experts}, {_rows(here, rows)}, N={n}, K={k}"
    draw.compare(lone_dx, dx[here], f"dx, {label}")
    draw.compare(lone_dw[expert], dw[expert], f"dweight, {label}")


def check_combine(draw: Draw, dtype: torch.dtype) -> None:
    """Tokens alone against the batch, and the gradients of what experts made and of weights."""
    tokens, slots, width = draw.integer(1, 400), draw.pick([1, 2, 8]), draw.pick([256, 1000, 2048])
    rows = draw.normal(tokens * slots, width, dtype=dtype).requires_grad_()
    index = draw.permutation(tokens * slots).to(torch.int32).view(tokens, slots)
    weights = draw.normal(tokens, slots, dtype=torch.float32).requires_grad_()
    grad = draw.normal(tokens, width, dtype=dtype)
    whole = moe_combine(rows, index, weights)
    d_rows, d_weights = torch.autograd.grad(whole, (rows, weights), grad)
    for some in draw.spans(tokens, 4):
        alone = moe_combine(rows, index[some].contiguous(), weights[some])
        some_rows, some_weights = torch.autograd.grad(alone, (rows, weights), grad[some])
        mine, label = index[some].flatten().long(), f"{_rows(some, tokens)}, {slots} slots, width {width}"
        draw.compare(whole[some].detach(), alone.detach(), label)
        draw.compare(d_rows[mine], some_rows[mine], f"gradient of rows, {label}")
        draw.compare(d_weights[some], some_weights[some], f"gradient of weights, {label}")


def check_expert_rows(draw: Draw, dtype: torch.dtype) -> None:
    """The gradient of tokens, alone and in the batch, whose experts' rows it comes from."""
    tokens, experts, width = draw.integer(1, 400), draw.pick([8, 60]), draw.pick([256, 1000])
    ids, slots = _routed(draw, tokens, experts), 2
    x, grad = draw.normal(tokens, width, dtype=dtype), draw.normal(tokens, slots, width, dtype=dtype)

    def gradient(rows: slice) -> torch.Tensor:
        order, mine = expert_order(ids[rows], experts), x[rows].requires_grad_()
        there = torch.empty(order.token.numel(), width, device=draw.device, dtype=dtype)
        there[order.place.flatten().long()] = grad[rows].flatten(0, 1)
        return torch.autograd.grad(expert_rows(mine, order), mine, there)[0]

    whole = gradient(slice(0, tokens))
    for some in draw.spans(tokens, 4):
        draw.compare(whole[some], gradient(some), f"{_rows(some, tokens)}, {experts} experts, width {width}")


def check_router(draw: Draw, dtype: torch.dtype) -> None:
    """Tokens alone against the batch with ties on purpose; given experts in another order against chosen ones."""
    tokens = draw.integer(1, 400)
    experts, chosen, groups, kept = draw.pick(
        [(8, 2, 1, 1), (128, 8, 1, 1), (256, 8, 8, 4), (60, 4, 1, 1), (512, 10, 1, 1), (384, 8, 1, 1), (64, 1, 1, 1)]
    )
    logits = (draw.normal(tokens, experts, dtype=dtype) * 4).round() / 4
    scoring: Scoring = draw.pick(("softmax", "sigmoid"))
    bias = draw.pick([None, draw.normal(experts, dtype=torch.float32)])
    rule: dict[str, Any] = {"scoring": scoring, "groups": groups, "groups_kept": kept, "bias": bias}
    weights, ids = router(logits, chosen, **rule)
    label = f"{chosen} of {experts} experts, {kept} of {groups} groups, {scoring}"
    for rows in draw.spans(tokens):
        alone = router(logits[rows].contiguous(), chosen, **rule)
        draw.compare(weights[rows], alone[0], f"weights, {_rows(rows, tokens)}, {label}")
        draw.compare(ids[rows], alone[1], f"ids, {_rows(rows, tokens)}, {label}")
    again, _ = router(logits, chosen, scoring=scoring, ids=ids.flip(1).contiguous())
    draw.compare(again.flip(1), weights, f"experts given in reverse, {tokens} tokens, {label}")


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm without a residual."""
    y = rms_norm(x, weight, 1e-6)
    assert isinstance(y, torch.Tensor)
    return y


def check_rms_norm(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch, with and without a residual."""
    width = draw.pick([64, 128, 1000, 2048, 4096, 80, 7168, 16_384])
    rows = draw.integer(1, 1500 if width > 128 else 6000)  # of so many narrow ones a program takes several
    x, residual, weight = (draw.values(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    y, total = rms_norm(x, weight, 1e-6, residual)
    plain = _norm(x, weight)
    for some in draw.spans(rows):
        alone = rms_norm(x[some], weight, 1e-6, residual[some])
        draw.compare(y[some], alone[0], f"{_rows(some, rows)}, width {width}")
        draw.compare(total[some], alone[1], f"x + residual, {_rows(some, rows)}, width {width}")
        draw.compare(plain[some], _norm(x[some], weight), f"{_rows(some, rows)}, width {width}, no residual")


def check_row_gradients(draw: Draw, dtype: torch.dtype) -> None:
    """Gradients of rows alone against the batch: norm, activation, log-probabilities, rotation; of a norm's weight twice."""
    rows, width = draw.integer(1, 300), draw.pick([128, 1000, 4096])
    x, weight = draw.values(rows, width, dtype=dtype), draw.values(width, dtype=dtype).requires_grad_()
    targets, places = draw.ints(0, width, rows), draw.ints(0, 512, rows)
    cos, sin = (draw.normal(512, width // 8, dtype=torch.float32) for _ in range(2))
    of_rows: dict[str, Callable[[torch.Tensor, slice], torch.Tensor]] = {
        "rms_norm": lambda x, _: _norm(x, weight),
        "swiglu": lambda x, _: swiglu(x),
        "log_prob": lambda x, some: log_prob(x, targets[some], temperature=0.9),
        "log_softmax": lambda x, _: log_softmax(x, temperature=0.9),
        "rope": lambda x, some: rope(x.view(len(x), 4, -1), x.view(len(x), 4, -1), cos, sin, places[some])[0],
    }
    for name, run in of_rows.items():
        leaf = x.detach().requires_grad_()
        out = run(leaf, slice(0, rows))
        grad = draw.normal(*out.shape, dtype=out.dtype)
        (whole,) = torch.autograd.grad(out, leaf, grad)
        for some in draw.spans(rows, 2):
            mine = x.detach()[some].requires_grad_()
            (alone,) = torch.autograd.grad(run(mine, some), mine, grad[some])
            draw.compare(whole[some], alone, f"{name}, {_rows(some, rows)}, width {width}")
    grad = draw.normal(rows, width, dtype=dtype)
    first, again = (torch.autograd.grad(_norm(x, weight), weight, grad)[0] for _ in range(2))
    draw.compare(first, again, f"rms_norm's weight twice, {rows} rows, width {width}")


def check_rope(draw: Draw, dtype: torch.dtype) -> None:
    """Tokens and heads alone against the batch, with and without the per-head norm."""
    tokens, heads, d = draw.integer(1, 300), draw.pick([8, 32]), draw.pick([64, 128, 80, 256])
    q, k = draw.values(tokens, heads, d, dtype=dtype), draw.values(tokens, 4, d, dtype=dtype)
    cos, sin = (draw.normal(4096, d // 2, dtype=torch.float32) for _ in range(2))
    positions = draw.ints(0, 4096, tokens)
    norms: dict[str, Any] = draw.pick([{"q_norm": draw.normal(d, dtype=dtype), "k_norm": draw.normal(d, dtype=dtype)}, {}])
    whole = rope(q, k, cos, sin, positions, **norms)
    for some in draw.spans(tokens, 3):
        alone = rope(q[some], k[some], cos, sin, positions[some], **norms)
        for name, a, b in zip(("q", "k"), whole, alone, strict=True):
            draw.compare(a[some], b, f"{name}, {_rows(some, tokens)}, {heads} heads, D={d}")
    ranks = draw.pick([2, 4])
    for rank in range(ranks):
        q_heads, k_heads = (slice(rank * h // ranks, (rank + 1) * h // ranks) for h in (heads, 4))
        part = rope(q[:, q_heads], k[:, k_heads], cos, sin, positions, **norms)
        draw.compare(part[0], whole[0][:, q_heads], f"q, rank {rank} of {ranks}, {tokens} tokens, {heads} heads, D={d}")
        draw.compare(part[1], whole[1][:, k_heads], f"k, rank {rank} of {ranks}, {tokens} tokens, D={d}")


def check_swiglu(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch."""
    rows, width = draw.integer(1, 300), draw.pick([96, 768, 3072, 14_336, 50])
    x = draw.values(rows, 2 * width, dtype=dtype)
    whole = swiglu(x)
    for some in draw.spans(rows):
        draw.compare(whole[some], swiglu(x[some]), f"{_rows(some, rows)}, width {width}")


def check_embedding(draw: Draw, dtype: torch.dtype) -> None:
    """Shards added up against the whole table; the gradient twice."""
    rows, width = 512, draw.pick([64, 1024])
    weight = draw.normal(rows, width, dtype=dtype).abs().requires_grad_()
    ids = draw.ints(0, rows, draw.integer(1, 300))
    out = embedding(ids, weight)
    for ranks in RANKS:
        share = rows // ranks
        shards = [embedding(ids, weight.detach()[r * share : (r + 1) * share], r * share) for r in range(ranks)]
        draw.compare(torch.stack(shards).sum(0), out.detach(), f"{ids.numel()} ids, width {width}, {ranks} ranks")
    grad = draw.normal(*out.shape, dtype=dtype)
    first = torch.autograd.grad(out, weight, grad, retain_graph=True)[0]
    draw.compare(first, torch.autograd.grad(out, weight, grad)[0], f"gradient twice, {ids.numel()} ids, width {width}")


def check_log_prob(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch, 2 to 16 simulated ranks against one, and log_softmax's column."""
    rows, vocab = draw.integer(1, 40), draw.pick([16_000, 32_000, 151_936, 50_257])
    logits = draw.values(rows, vocab, dtype=dtype, scale=4.0)
    targets = draw.ints(0, vocab, rows)
    whole = log_prob(logits, targets, temperature=0.9)
    for some in draw.spans(rows, 4):
        draw.compare(whole[some], log_prob(logits[some], targets[some], temperature=0.9), f"{_rows(some, rows)}, V={vocab}")
    each = torch.tensor([draw.pick([0.7, 0.9, 1.0, 1.1]) for _ in range(rows)], device=logits.device)
    mixed = log_prob(logits, targets, temperature=each)
    same = each == each.new_tensor(0.9)
    draw.compare(mixed[same], whole[same], f"a temperature a row, {rows} rows, V={vocab}")
    column = log_softmax(logits, temperature=0.9).gather(1, targets[:, None])[:, 0]
    draw.compare(column, whole, f"log_softmax, {rows} rows, V={vocab}")
    if vocab % 16:
        return
    ranks = draw.pick((*RANKS, 16))
    width = vocab // ranks
    parts = [log_prob_partials(logits[:, r * width : (r + 1) * width].contiguous(), vocab, 0.9) for r in range(ranks)]
    m, s = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    chosen = logits.gather(1, targets[:, None])[:, 0].float()
    draw.compare(combine_log_prob(m, s, chosen, 0.9)[0], whole, f"{rows} rows, V={vocab}, {ranks} ranks")


def check_linear_log_prob(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch, more and fewer of them at a time, and the head's product and `log_prob` one after the other."""
    rows, vocab, k = draw.integer(1, 200), draw.pick([1024, 50_257, 32_000]), draw.pick([256, 1000])
    hidden, weight = draw.values(rows, k, dtype=dtype), _weight(draw, vocab, k, dtype)
    targets = draw.ints(0, vocab, rows)
    whole = linear_log_prob(hidden, weight, targets, temperature=0.9)
    label = f"V={vocab}, K={k}"
    draw.compare(log_prob(matmul(hidden, weight), targets, temperature=0.9), whole, f"in two steps, {rows} rows, {label}")
    for some in draw.spans(rows, 3):
        at_once = draw.integer(1, rows)
        alone = linear_log_prob(hidden[some], weight, targets[some], temperature=0.9, rows_at_once=at_once)
        draw.compare(whole[some], alone, f"{_rows(some, rows)}, {at_once} at once, {label}")


def check_vocab_scores(draw: Draw, dtype: torch.dtype) -> None:
    """What trainers' losses take of a row, and its gradient: rows alone against the batch."""
    rows, vocab = draw.integer(1, 100), draw.pick([1000, 32_000, 151_936, 50_257])
    logits, targets = draw.values(rows, vocab, dtype=dtype, scale=4.0), draw.ints(0, vocab, rows)
    given: dict[str, Any] = {"first": 0, "columns": vocab - draw.integer(0, 3), "temperature": 0.9}
    grads = [draw.normal(rows, dtype=torch.float32) for _ in range(2)]

    def found(some: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top, sums = row_statistics(logits[some], targets[some], **given)
        log_sum = sums[0].log()
        of_row = (top + log_sum, log_sum - sums[1] / sums[0], *(grad[some] for grad in grads))
        return top, sums.T, scores_gradient(logits[some], targets[some], *of_row, **given)

    whole = found(slice(0, rows))
    for some in draw.spans(rows, 3):
        for name, a, b in zip(("maximum", "sums", "gradient"), whole, found(some), strict=True):
            draw.compare(a[some], b, f"{name}, {_rows(some, rows)}, V={vocab}, {given}")


def check_sample(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch."""
    rows, vocab = draw.integer(1, 60), draw.pick([1000, 32_000, 151_936])
    logits, seeds = draw.normal(rows, vocab, dtype=dtype, scale=2.0), draw.ints(0, 2**62, rows)
    positions = draw.ints(0, 2**33, rows)
    options: dict[str, Any] = draw.pick([{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}])
    whole = sample(logits, seeds, positions, **options)
    for some in draw.spans(rows, 4):
        alone = sample(logits[some], seeds[some], positions[some], **options)
        draw.compare(whole[some], alone, f"{_rows(some, rows)}, V={vocab}, {options}")
    each = torch.tensor([draw.pick([0.7, 1.0, 1.3]) for _ in range(rows)], device=logits.device)
    one = sample(logits, seeds, positions, temperature=0.7)
    mixed = sample(logits, seeds, positions, temperature=each)
    draw.compare(mixed[each == each.new_tensor(0.7)], one[each == each.new_tensor(0.7)], f"a temperature a row, {rows} rows")


def check_fp8(draw: Draw, dtype: torch.dtype) -> None:
    """Rows alone against the batch, plain and grouped."""
    n, k, experts = draw.pick([(512, 1024, 8), (1024, 512, 16), (272, 384, 4)])
    tokens = draw.integer(1, 600)
    x, weight = draw.normal(tokens, k, dtype=dtype), draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5)
    (values, scales), (w, w_scale) = quantize_rows(x), quantize_weight(weight)
    ids = _routed(draw, tokens, experts)
    whole = fp8_matmul(values, scales, w[0], w_scale[0])

    def product(rows: torch.Tensor, _: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return fp8_grouped_matmul(*quantize_rows(rows), w, w_scale, counts)

    grouped = _through_experts(x, weight, ids, product)
    for rows in draw.spans(tokens, 3):
        alone = quantize_rows(x[rows])
        label = f"{_rows(rows, tokens)}, N={n}, K={k}"
        draw.compare(values[rows].view(torch.uint8), alone[0].view(torch.uint8), f"quantised, {label}")
        draw.compare(scales[rows], alone[1], f"scales, {label}")
        draw.compare(whole[rows], fp8_matmul(*alone, w[0], w_scale[0]), label)
        draw.compare(grouped[rows], _through_experts(x[rows], weight, ids[rows], product), f"{label}, {experts} experts")


@dataclass(frozen=True, slots=True)
class Check:
    """A check, the dtypes it runs in, and how much compiling its first draws take beside the others'."""

    name: str
    run: Callable[[Draw, torch.dtype], None]
    dtypes: tuple[torch.dtype, ...] = HALF
    weight: int = 1

    def weight_in(self, dtype: torch.dtype) -> int:
        """Its weight in one of its dtypes: float32 takes portable kernels, of which there are few."""
        return self.weight if dtype in HALF else max(1, self.weight // 4)


CHECKS = (
    Check("embedding", check_embedding, ALL),
    Check("rms_norm", check_rms_norm, ALL),
    Check("matmul rows", check_matmul_rows, ALL, weight=4),
    Check("matmul tiles", check_matmul_tiles, weight=8),
    Check("matmul tensor parallel", check_matmul_ranks, ALL, weight=4),
    Check("matmul gradients", check_matmul_gradients, weight=3),
    Check("rope", check_rope, ALL),
    Check("attention", check_attention, weight=8),
    Check("attention, other heads", check_other_heads, weight=8),
    Check("attention decode", check_decode, weight=8),
    Check("attention gradients", check_gradients, weight=8),
    Check("swiglu", check_swiglu, ALL),
    Check("router", check_router, (torch.float32,)),
    Check("grouped_matmul", check_grouped_rows, ALL, weight=4),
    Check("grouped_matmul gradients", check_grouped_gradients, weight=4),
    Check("expert_rows", check_expert_rows, ALL),
    Check("moe_combine", check_combine, ALL),
    Check("fp8", check_fp8, (torch.bfloat16,), weight=3),
    Check("log_prob", check_log_prob, ALL, weight=2),
    Check("linear_log_prob", check_linear_log_prob, ALL, weight=3),
    Check("vocab_scores", check_vocab_scores, ALL),
    Check("row gradients", check_row_gradients, ALL, weight=2),
    Check("sample", check_sample, ALL),
)
