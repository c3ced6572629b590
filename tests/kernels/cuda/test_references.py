"""What the ops compute on a machine without a GPU: values and gradients against float64, and no dependence on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.kernels.cuda.attention import attention, attention_with_lse
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows, quantize_weight
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.log_prob import combine_log_prob, log_prob, log_prob_partials, log_softmax
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.moe_combine import moe_combine
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import CacheRows, rope
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.sample import sample
from miles_plan.kernels.cuda.swiglu import swiglu

Error = Callable[[torch.Tensor, torch.Tensor], float]
HALF_EPSILON = 4e-3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("order", ["chain", "tree"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul(order: str, dtype: torch.dtype, error: Error) -> None:
    x, weight = normal(5, 128, dtype=dtype).requires_grad_(), normal(128, 128, dtype=dtype).requires_grad_()
    y = matmul(x, weight, order=order, grad_order=order)  # type: ignore[arg-type]  # a literal
    grad = normal(5, 128, dtype=dtype)
    y.backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    x64, w64 = doubles(x, weight)
    (x64 @ w64.T).backward(grad.double())  # type: ignore[no-untyped-call]
    limit = HALF_EPSILON if dtype == torch.bfloat16 else 1e-6
    assert error(y, x64 @ w64.T) < limit
    assert x.grad is not None
    assert weight.grad is not None
    assert error(x.grad, x64.grad) < limit  # type: ignore[arg-type]
    assert error(weight.grad, w64.grad) < limit  # type: ignore[arg-type]
    assert torch.equal(matmul(x[2:3], weight, order=order), y[2:3])  # type: ignore[arg-type]
    assert matmul(x[:0], weight).shape == (0, 128)


def test_grouped_matmul(error: Error) -> None:
    counts = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    x, weight = normal(9, 32).requires_grad_(), normal(4, 16, 32).requires_grad_()
    y = grouped_matmul(x, weight, counts)
    grad = normal(9, 16)
    y.backward(grad)  # type: ignore[no-untyped-call]
    x64, w64 = doubles(x, weight)
    exact = torch.cat([rows @ w64[e].T for e, rows in enumerate(x64.split(counts.tolist()))])
    exact.backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(y, exact) < HALF_EPSILON
    assert error(x.grad, x64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    assert error(weight.grad, w64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    alone = torch.tensor([0, 0, 1, 0], dtype=torch.int32)
    assert torch.equal(grouped_matmul(x[4:5], weight, alone), y[4:5])
    # Expert parallelism: a rank owns two experts and their rows.
    parts = [grouped_matmul(x[:3], weight[:2], counts[:2]), grouped_matmul(x[3:], weight[2:].contiguous(), counts[2:])]
    assert torch.equal(torch.cat(parts), y)


def test_moe_combine_adds_in_slot_order_and_skips_dropped_slots(error: Error) -> None:
    rows = normal(12, 24).requires_grad_()
    index = torch.randperm(12).to(torch.int32).view(4, 3)
    index[1, 2] = -1
    weights = torch.rand(4, 3).requires_grad_()
    y = moe_combine(rows, index, weights)
    grad = normal(4, 24)
    y.backward(grad)  # type: ignore[no-untyped-call]
    rows64, weights64 = doubles(rows, weights)
    exact = (rows64[index.clamp(min=0).long()] * (weights64 * (index >= 0))[..., None]).sum(1)
    exact.backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(y, exact) < HALF_EPSILON
    assert error(rows.grad, rows64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    assert error(weights.grad, weights64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    total = torch.zeros(24)
    for slot in range(3):
        total = (rows[index[0, slot]].double() * weights[0, slot].double() + total.double()).float()
    assert torch.equal(y[0], total.bfloat16())


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router(scoring: str, error: Error) -> None:
    logits = torch.randn(6, 16)
    logits[2, 1] = logits[2, 3] = logits[2].max() + 1  # a tie at the top, inside one group
    logits.requires_grad_()
    options: dict[str, Any] = {"scoring": scoring, "scale": 2.5}
    weights, ids = router(logits, 4, bias=torch.zeros(16), groups=4, groups_kept=2, **options)
    assert ids[2, :2].tolist() == [1, 3]
    torch.testing.assert_close(weights.sum(1), torch.full((6,), 2.5))
    assert all(len({expert // 4 for expert in row}) <= 2 for row in ids.tolist())
    grad = torch.randn(6, 4)
    weights.backward(grad)  # type: ignore[no-untyped-call]
    (leaf,) = doubles(logits)
    scores = torch.softmax(leaf, -1) if scoring == "softmax" else torch.sigmoid(leaf)
    picked = scores.gather(1, ids.long())
    (picked / picked.sum(1, keepdim=True) * 2.5).backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(logits.grad, leaf.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_order_of_given_experts_does_not_show(scoring: Any) -> None:
    logits = torch.randn(200, 16).requires_grad_()
    weights, ids = router(logits, 6, scoring=scoring)
    grad = torch.randn(200, 6)
    (want,) = torch.autograd.grad(weights, logits, grad)
    recorded = ids.flip(1).contiguous()
    replayed, same = router(logits, 6, scoring=scoring, ids=recorded)
    assert torch.equal(replayed.flip(1), weights)
    assert torch.equal(same, recorded)
    assert torch.equal(torch.autograd.grad(replayed, logits, grad.flip(1))[0], want)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(1, 9))
def test_neighbours_do_not_show(seed: int, dtype: torch.dtype, tokens: int) -> None:
    """The ops that need no more than rows: the first row alone has the bits that it has in the batch."""
    torch.manual_seed(seed)
    x, weight = normal(tokens, 48, dtype=dtype), normal(48, dtype=dtype)
    cos, sin = torch.randn(30, 12), torch.randn(30, 12)
    at, seeds = torch.randint(0, 30, (tokens,)), torch.randint(0, 2**62, (tokens,))
    index, logits = torch.randperm(tokens).to(torch.int32)[:, None], torch.randn(tokens, 16)

    def results(rows: slice) -> list[torch.Tensor]:
        heads = x[rows].view(-1, 2, 24)
        return [
            rms_norm(x[rows], weight), swiglu(x[rows]), *rope(heads, heads, cos, sin, at[rows]), *router(logits[rows], 3),
            moe_combine(x, index[rows], logits[rows, :1].contiguous()), sample(x[rows], seeds[rows], at[rows], temperature=0.8),
            log_softmax(x[rows]), matmul(x[rows], x), quantize_rows(torch.cat([x[rows]] * 8, 1)[:, :128])[1],
        ]  # fmt: skip

    for alone, whole in zip(results(slice(0, 1)), results(slice(0, tokens)), strict=True):
        assert torch.equal(alone, whole[:1])


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, causal: bool = True
) -> torch.Tensor:
    """One sequence in the inputs' precision; queries are its last ones."""
    group, n, length = q.shape[1] // k.shape[1], q.shape[0], k.shape[0]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    place, key = torch.arange(length - n, length)[:, None], torch.arange(length)[None]
    seen = (key <= place) if causal else torch.ones(n, length, dtype=torch.bool)
    if window is not None:
        seen = seen & (key > place - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -1e300).softmax(-1), v)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dv", "window", "causal"),
    [
        (4, 2, 32, 32, None, True),
        (6, 1, 64, 64, 40, True),
        (2, 2, 192, 128, None, True),
        (4, 4, 16, 16, None, False),
        (3, 1, 576, 512, None, True),
    ],
)
def test_attention(heads: int, kv_heads: int, d: int, dv: int, window: int | None, causal: bool, error: Error) -> None:
    lens = [70, 5]
    starts = torch.tensor([0, 70, 75], dtype=torch.int32)
    q, k, v = (normal(75, h, size).requires_grad_() for h, size in ((heads, d), (kv_heads, d), (kv_heads, dv)))
    out = attention(q, k, v, q_starts=starts, window=window, causal=causal)
    grad = normal(*out.shape)
    out.backward(grad)  # type: ignore[no-untyped-call]
    q64, k64, v64 = doubles(q, k, v)
    parts = zip(q64.split(lens), k64.split(lens), v64.split(lens), strict=True)
    exact = torch.cat([exact_attention(*part, window, causal) for part in parts])
    exact.backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(out, exact) < 6e-3
    for tensor, reference in ((q, q64), (k, k64), (v, v64)):
        assert error(tensor.grad, reference.grad) < 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 150])
def test_decode_chunks_and_pages_give_prefills_bits(window: int | None) -> None:
    length, page = 1100, 16  # over a chunk's end
    q, k, v = normal(length, 4, 16), normal(length, 2, 16), normal(length, 2, 16)
    whole = attention(q, k, v, window=window)
    pages = -(-length // page)
    table = torch.randperm(pages + 2)[:pages].to(torch.int32)[None]
    k_pages, v_pages = (torch.full((pages + 2, page, 2, 16), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    for i in range(pages):
        rows = slice(i * page, min((i + 1) * page, length))
        k_pages[table[0, i], : rows.stop - rows.start] = k[rows]
        v_pages[table[0, i], : rows.stop - rows.start] = v[rows]
    for first, last in ((1099, 1100), (1000, 1030), (5, 6), (0, 3)):
        kv_lens = torch.tensor([last], dtype=torch.int32)
        part = attention(q[first:last], k, v, kv_lens=kv_lens, window=window)
        assert torch.equal(part, whole[first:last])
        paged = attention(q[first:last], k_pages, v_pages, kv_lens=kv_lens, page_table=table, window=window)
        assert torch.equal(paged, part)


def test_log_sum_exp(error: Error) -> None:
    q, k, v = normal(9, 2, 16), normal(9, 2, 16), normal(9, 2, 16)
    _, lse = attention_with_lse(q, k, v)
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.double()) / 4
    seen = torch.arange(9)[None] <= torch.arange(9)[:, None]
    assert error(lse, torch.logsumexp(scores.masked_fill(~seen[:, None], float("-inf")), -1)) < 1e-5


def test_rms_norm_with_residual(error: Error) -> None:
    x, residual, weight = (normal(*shape).requires_grad_() for shape in ((6, 96), (6, 96), (96,)))
    y, total = rms_norm(x, weight, 1e-6, residual)
    grads = normal(6, 96), normal(6, 96)
    torch.autograd.backward([y, total], list(grads))
    assert torch.equal(total, (x + residual))
    t64, w64 = doubles(total, weight)
    exact = torch.nn.functional.rms_norm(t64, (96,), w64, 1e-6)
    exact.backward(grads[0].double())  # type: ignore[no-untyped-call]
    assert error(y, exact) < HALF_EPSILON
    assert t64.grad is not None
    assert error(x.grad, t64.grad + grads[1].double()) < 8e-3  # type: ignore[arg-type]
    assert torch.equal(x.grad, residual.grad)  # type: ignore[arg-type]
    assert error(weight.grad, w64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    alone = rms_norm(x[3:4], weight, 1e-6, residual[3:4])
    assert torch.equal(alone[0], y[3:4])


def test_a_norms_sum_and_its_norm_may_each_be_used_alone() -> None:
    x, r = normal(5, 64).requires_grad_(), normal(5, 64).requires_grad_()
    w = normal(64).requires_grad_()
    grad = normal(5, 64)
    both, alone = rms_norm(x, w, 1e-5, r), rms_norm((x + r).detach().requires_grad_(), w, 1e-5)
    assert isinstance(both, tuple)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(both[0], alone)
    for used in ((0,), (1,), (0, 1)):
        total = rms_norm(x, w, 1e-5, r)
        found = torch.autograd.grad([total[i] for i in used], (x, r, w), [grad] * len(used), allow_unused=True)
        lone = (x + r).detach().requires_grad_()
        want = torch.zeros_like(grad)
        if 0 in used:
            normed = rms_norm(lone, w, 1e-5)
            assert isinstance(normed, torch.Tensor)
            want = torch.autograd.grad(normed, lone, grad)[0]
        want = want + grad if 1 in used else want
        assert torch.equal(found[0], want)
        assert torch.equal(found[1], want)
        assert (found[2] is None) == (0 not in used)


def test_rope_rotates_and_its_gradient_rotates_back(error: Error) -> None:
    q, k = normal(5, 4, 32).requires_grad_(), normal(5, 2, 32).requires_grad_()
    angle = torch.rand(20, 16) * 6
    positions = torch.tensor([3, 19, 0, 7, 7])
    q_out, k_out = rope(q, k, angle.cos(), angle.sin(), positions)
    grad = normal(5, 4, 32)
    torch.autograd.backward([q_out, k_out], [grad, torch.zeros_like(k_out)])
    (q64,) = doubles(q)
    x1, x2 = q64.chunk(2, -1)
    c, s = (t.double()[positions][:, None] for t in (angle.cos(), angle.sin()))
    exact = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
    exact.backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(q_out, exact) < HALF_EPSILON
    assert error(q.grad, q64.grad) < HALF_EPSILON  # type: ignore[arg-type]
    with torch.no_grad():
        ones = torch.ones(32).bfloat16()
        normed, _ = rope(q, k, torch.ones(20, 16), torch.zeros(20, 16), positions, q_norm=ones, k_norm=ones)
    assert error(normed, torch.nn.functional.rms_norm(q64, (32,), eps=1e-6)) < 6e-3


def test_rope_writes_the_cache() -> None:
    q, k, v = normal(5, 8, 32).split((4, 2, 2), 1)
    cos, sin, at, slots = torch.rand(20, 16), torch.rand(20, 16), torch.tensor([3, 19, 0, 7, 7]), torch.tensor([8, 0, 3, 4, 2])
    keys, values = torch.zeros(9, 2, 32).bfloat16(), torch.zeros(9, 2, 32).bfloat16()
    turned = rope(q, k, cos, sin, at, cache=CacheRows(keys, values, v, slots))
    assert all(torch.equal(a, b) for a, b in zip(turned, rope(q, k, cos, sin, at), strict=True))
    assert torch.equal(keys[slots], turned[1])
    assert torch.equal(values[slots], v)
    untouched = [1, 5, 6, 7]
    assert not keys[untouched].any()
    assert not values[untouched].any()


def test_swiglu(error: Error) -> None:
    x = normal(4, 50).requires_grad_()
    y = swiglu(x)
    grad = normal(4, 25)
    y.backward(grad)  # type: ignore[no-untyped-call]
    (x64,) = doubles(x)
    gate, up = x64.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    exact.backward(grad.double())  # type: ignore[no-untyped-call]
    assert error(y, exact) < HALF_EPSILON
    assert error(x.grad, x64.grad) < HALF_EPSILON  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_embedding_shards_add_up(ranks: int, error: Error) -> None:
    weight = normal(16, 8).requires_grad_()
    ids = torch.randint(0, 16, (3, 7))
    share = 16 // ranks
    parts = [embedding(ids, weight[r * share : (r + 1) * share], r * share) for r in range(ranks)]
    out = torch.stack(parts).sum(0)
    grad = normal(3, 7, 8)
    out.backward(grad)  # type: ignore[no-untyped-call]
    (w64,) = doubles(weight)
    torch.nn.functional.embedding(ids, w64).backward(grad.double())  # type: ignore[no-untyped-call]
    assert torch.equal(out.detach(), weight.detach()[ids])
    assert error(weight.grad, w64.grad) < HALF_EPSILON  # type: ignore[arg-type]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8, 16]), st.sampled_from([512, 4096]))
def test_log_prob_of_shards_is_log_prob(seed: int, ranks: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, vocab, generator=generator) * 4).bfloat16()
    targets = torch.randint(0, vocab, (4,), generator=generator)
    whole = log_prob(logits, targets, temperature=0.8)
    width = vocab // ranks
    parts = [log_prob_partials(logits[:, r * width : (r + 1) * width], vocab, 0.8) for r in range(ranks)]
    m, s = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    chosen = logits.gather(1, targets[:, None])[:, 0].float()
    assert torch.equal(combine_log_prob(m, s, chosen, 0.8)[0], whole)
    assert torch.equal(log_softmax(logits, temperature=0.8).gather(1, targets[:, None])[:, 0], whole)
    assert torch.equal(log_prob(logits[1:2], targets[1:2], temperature=0.8), whole[1:2])
    exact = torch.log_softmax(logits.double() / 0.8, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(whole.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [64, 256])
def test_linear_log_prob_is_matmul_and_log_prob(vocabulary: int, error: Error) -> None:
    hidden, weight = normal(7, 32).requires_grad_(), normal(vocabulary, 32).requires_grad_()
    targets, grad = torch.randint(0, vocabulary, (7,)), torch.randn(7)
    found = linear_log_prob(hidden, weight, targets, temperature=0.7)
    assert torch.equal(found, log_prob(matmul(hidden, weight), targets, temperature=0.7))
    assert torch.equal(found, linear_log_prob(hidden, weight, targets, temperature=0.7, rows_at_once=3)), "blocks do not show"
    d_hidden, d_weight = torch.autograd.grad(found, (hidden, weight), grad)
    blocks = linear_log_prob(hidden, weight, targets, temperature=0.7, rows_at_once=3)
    assert torch.equal(torch.autograd.grad(blocks, hidden, grad)[0], d_hidden)
    h64, w64 = doubles(hidden, weight)
    exact = torch.log_softmax(h64 @ w64.T / 0.7, -1).gather(1, targets[:, None])[:, 0]
    for ours, want in zip((d_hidden, d_weight), torch.autograd.grad(exact, (h64, w64), grad.double()), strict=True):
        assert error(ours, want) < 1e-2
    assert linear_log_prob(hidden[:0], weight, targets[:0]).shape == (0,)


@pytest.mark.parametrize("vocabulary", [64, 1000, 4096])
def test_a_certain_tokens_log_prob_is_not_above_0(vocabulary: int) -> None:
    logits = normal(256, vocabulary) * 5
    targets = torch.arange(256) * 7 % vocabulary
    rows = torch.arange(256)
    logits[rows, targets] = logits.amax(1) + torch.linspace(0, 60, 256).to(logits.dtype)
    found = log_prob(logits, targets)
    assert found.max() == 0
    assert log_softmax(logits).max() == 0
    assert torch.equal(log_softmax(logits)[rows, targets], found)
    logits[0, 5] = float("nan")
    assert log_prob(logits, targets)[0].isnan(), "what is not a number is not hidden"


def test_log_softmax_is_differentiable(error: Error) -> None:
    logits = normal(5, 300).requires_grad_()
    grad = torch.randn(5, 300)
    (d_logits,) = torch.autograd.grad(log_softmax(logits, temperature=0.7), logits, grad)
    (wide,) = doubles(logits)
    (want,) = torch.autograd.grad(torch.log_softmax(wide / 0.7, -1), wide, grad.double())
    assert error(d_logits, want) < HALF_EPSILON


def test_sample_follows_the_distribution_and_the_counter() -> None:
    n = 4000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(n, 1)
    seeds, positions = torch.full((n,), 7), torch.arange(n)
    tokens = sample(logits, seeds, positions)
    share = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=0.03, rtol=0)
    assert torch.equal(sample(logits[100:200], seeds[100:200], positions[100:200]), tokens[100:200])
    assert set(sample(logits, seeds, positions, top_k=2).tolist()) == {1, 2}
    assert set(sample(logits[:100], seeds[:100], positions[:100], top_p=0.5).tolist()) == {2}
    assert set(sample(logits, seeds, positions, temperature=0.0).tolist()) == {2}


def test_fp8(error: Error) -> None:
    x, weight = torch.randn(10, 256), torch.randn(3, 144, 256) / 16
    values, scales = quantize_rows(x)
    w, w_scales = quantize_weight(weight)
    exact = (values.double() * scales.double().repeat_interleave(128, -1)) @ (
        w[0].double() * w_scales[0].double().repeat_interleave(128, 0)[:144].repeat_interleave(128, 1)
    ).T
    y = fp8_matmul(values, scales, w[0], w_scales[0], out_dtype=torch.float32)
    assert error(y, exact) < 1e-3  # the tensor core keeps 13 bits of an FP8 product's sum
    assert error(y, x.double() @ weight[0].double().T) < 0.08  # what the format costs
    assert torch.equal(fp8_matmul(*quantize_rows(x[4:5]), w[0], w_scales[0], out_dtype=torch.float32), y[4:5])
    counts = torch.tensor([4, 0, 6], dtype=torch.int32)
    grouped = fp8_grouped_matmul(values, scales, w, w_scales, counts, out_dtype=torch.float32)
    assert torch.equal(grouped[:4], y[:4])
    zeros, ones = quantize_rows(torch.zeros(1, 128))
    assert zeros.float().abs().sum() == 0
    assert ones.item() == 1.0


@pytest.mark.parametrize("temperature", [0.85, 0.9, 1.1])
def test_a_temperature_counts_in_float32(temperature: float) -> None:
    """SGLang keeps it so; a trainer's plan has it in float64."""
    kept = float(torch.tensor(temperature, dtype=torch.float32))
    logits, targets = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 4, torch.arange(64)
    assert torch.equal(log_prob(logits, targets, temperature=temperature), log_prob(logits, targets, temperature=kept))
