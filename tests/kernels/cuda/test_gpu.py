"""On a GPU: invariance by `verify`, gradients and accuracy against float64, CUDA graphs, several GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_plan.backends.training.scores import VocabParallelScores
from miles_plan.kernels.cuda import attention as attention_module
from miles_plan.kernels.cuda.attention import attention, attention_with_lse
from miles_plan.kernels.cuda.draw import Draw
from miles_plan.kernels.cuda.embedding import embedding, embedding_reference
from miles_plan.kernels.cuda.expert_rows import expert_order, expert_rows
from miles_plan.kernels.cuda.gemm import gemm
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.invariance_checks import CHECKS, Check
from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.log_prob import log_prob, log_softmax
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.moe_combine import moe_combine, moe_combine_reference
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import CacheRows, rope, rope_reference
from miles_plan.kernels.cuda.router import Rule, router, router_reference
from miles_plan.kernels.cuda.swiglu import swiglu
from miles_plan.kernels.cuda.tuning import GemmProblem, candidates, overlaps_of
from miles_plan.kernels.cuda.verify import verify

pytestmark = pytest.mark.gpu
DRAW_SECONDS = 40.0
LEAST_DRAWS = 4  # of the slowest op and dtype where every kernel is compiled first; with a warm cache most reach thousands
Error = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.mark.timeout(200)
def test_random_draws_differ_in_no_bit(gpu: torch.device) -> None:
    """Every op and dtype on random shapes, positions and neighbours: `miles-plan kernels verify`."""
    report = verify(seconds=DRAW_SECONDS)
    wrong = [op for op in report.ops if not op.ok]
    assert not wrong, wrong
    few = {(op.op, op.dtype): op.draws for op in report.ops if op.draws < LEAST_DRAWS}
    assert not few


def test_verify_names_the_op_that_differs_first(gpu: torch.device) -> None:
    def differs(draw: Draw, dtype: torch.dtype) -> None:
        x = draw.normal(300, 4096, dtype=dtype)
        draw.compare(x @ x.T, torch.stack([row @ x.T for row in x]), "cuBLAS, row by row")

    fine = next(check for check in CHECKS if check.name == "swiglu")
    checks = (fine, Check("cublas", differs, (torch.bfloat16,)), Check("again", differs, (torch.bfloat16,)))
    report = verify(seconds=0.0, workers=1, checks=checks)
    assert not report.ok
    assert report.first is not None
    assert report.first.op == "cublas"
    assert report.first.first_shape == "cuBLAS, row by row"


TILED = {
    "one row": GemmProblem(1, 512, 1024), "chain": GemmProblem(700, 6144, 512),
    "tree": GemmProblem(700, 512, 1408, leaves=8),  # leaves of 176 = 2 x 64 + 48
    "tree of dx": GemmProblem(700, 512, 1408, leaves=8, b_kn=True),
    "dW": GemmProblem(6144, 512, 700, a_km=True, b_kn=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overlap", [None, 0, 1, 2])
@pytest.mark.parametrize("product", TILED)
def test_every_tile_gives_the_portable_kernels_bits(
    gpu: torch.device, product: str, overlap: int | None, dtype: torch.dtype
) -> None:
    """Each launched as it usually is (None), and every fourth in every way. What takes the time is compiling them, which as
    several tests several processes share: as one it took minutes."""
    problem = replace(TILED[product], dtype=dtype, out_dtype=dtype)
    lying: dict[str, Any] = {"leaves": problem.leaves, "a_km": problem.a_km, "b_kn": problem.b_kn}
    a = torch.randn((problem.k, problem.m) if problem.a_km else (problem.m, problem.k), device=gpu).to(dtype)
    b = (torch.randn((problem.k, problem.n) if problem.b_kn else (problem.n, problem.k), device=gpu) / 30).to(dtype)
    want = torch.empty(problem.m, problem.n, device=gpu, dtype=dtype)
    gemm(a, b, want, portable=True, **lying)
    tiles = candidates(problem, torch.cuda.get_device_properties(gpu).multi_processor_count)
    tiles = tiles[:: 1 if product == "chain" else 3]
    if overlap is not None:
        tiles = [replace(tile, overlap=overlap) for tile in tiles[::4] if overlap in overlaps_of(tile)]
    assert tiles
    for tile in tiles:
        out = torch.full_like(want, float("nan"))
        gemm(a, b, out, tile=tile, **lying)
        assert torch.equal(out, want), tile


@pytest.mark.parametrize(("m", "n", "k"), [(64, 512, 4096), (700, 1024, 2048)])
def test_products_are_no_less_accurate_than_cublas(gpu: torch.device, m: int, n: int, k: int, error: Error) -> None:
    x, weight = torch.randn(m, k, device=gpu).bfloat16(), (torch.randn(n, k, device=gpu) / k**0.5).bfloat16()
    exact = x.double() @ weight.double().T
    theirs = error(torch.mm(x, weight.T), exact)
    for order in ("chain", "tree"):
        assert error(matmul(x, weight, order=order), exact) <= theirs * 1.01  # type: ignore[arg-type]


def exact_experts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows @ weight[expert].T for expert, rows in enumerate(x.split(SHARES))])


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, 1e-6)


def exact_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def exact_rotation(x: torch.Tensor) -> torch.Tensor:
    cos, sin = (table.double()[:, None] for table in angles(x.device))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def angles(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 50 positions and heads of 64."""
    turns = torch.outer(torch.arange(50.0), 10_000 ** -torch.linspace(0, 1, 32)).to(device)
    return turns.cos(), turns.sin()


def routed(device: torch.device) -> torch.Tensor:
    """Two of seven experts for each of 40 tokens."""
    return torch.rand(40, 7, generator=torch.Generator().manual_seed(0)).topk(2).indices.to(device)


def scores(x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    targets = torch.arange(len(x), device=x.device) if targets is None else targets
    apply: Any = VocabParallelScores.apply
    log_probs, entropies = apply(x, targets, 0, x.shape[1], 0.7, None)
    return torch.cat([log_probs, entropies])


def exact_scores(x: torch.Tensor) -> torch.Tensor:
    log_q = torch.log_softmax(x / 0.7, -1)
    return torch.cat([log_q.gather(1, torch.arange(50, device=x.device)[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1)])


SHARES = [70, 0, 33, 97]
Operation = Callable[..., torch.Tensor]
DIFFERENTIABLE: dict[str, tuple[Operation, Operation, tuple[tuple[int, ...], ...]]] = {
    "matmul chain": (matmul, lambda x, w: x @ w.T, ((200, 384), (256, 384))),
    "matmul tree": (
        lambda x, w: matmul(x, w, order="tree", grad_order="tree"), lambda x, w: x @ w.T, ((200, 384), (256, 384)),
    ),
    "column_parallel_linear": (column_parallel_linear, lambda x, w: x @ w.T, ((40, 5, 384), (256, 384))),
    "row_parallel_linear": (row_parallel_linear, lambda x, w: x @ w.T, ((40, 5, 384), (256, 384))),
    "grouped_matmul": (
        lambda x, w: grouped_matmul(x, w, torch.tensor(SHARES, device=x.device, dtype=torch.int32)), exact_experts,
        ((200, 256), (4, 128, 256)),
    ),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), exact_norm, ((200, 1000), (1000,))),
    "swiglu": (swiglu, exact_swiglu, ((200, 700),)),
    "rope": (
        lambda x: rope(x, x, *angles(x.device), torch.arange(50, device=x.device))[0], exact_rotation, ((50, 3, 64),),
    ),
    "embedding": (
        lambda w: embedding(torch.arange(90, device=w.device) % 40, w),
        lambda w: w[torch.arange(90, device=w.device) % 40], ((60, 200),),
    ),
    "expert_rows": (
        lambda x: expert_rows(x, expert_order(routed(x.device), 7)),
        lambda x: x[routed(x.device).flatten().argsort(stable=True) // 2], ((40, 200),),
    ),
    "moe_combine": (
        lambda x, w: moe_combine(x, torch.arange(60, device=x.device, dtype=torch.int32).view(15, 4), w.float()),
        lambda x, w: (x.view(15, 4, 200) * w[..., None]).sum(1), ((60, 200), (15, 4)),
    ),
    "vocab_scores": (scores, exact_scores, ((50, 4096),)),
    "log_softmax": (
        lambda x: log_softmax(x, temperature=0.7), lambda x: torch.log_softmax(x / 0.7, -1), ((50, 4096),),
    ),
    "linear_log_prob": (
        lambda x, w: linear_log_prob(x, w, torch.arange(50, device=x.device), temperature=16.0, rows_at_once=20),
        lambda x, w: torch.log_softmax(x @ w.T / 16, -1).gather(1, torch.arange(50, device=x.device)[:, None])[:, 0],
        ((50, 256), (1024, 256)),
    ),
    "log_prob": (
        lambda x: log_prob(x, torch.arange(50, device=x.device), temperature=0.7),
        lambda x: torch.log_softmax(x / 0.7, -1).gather(1, torch.arange(50, device=x.device)[:, None])[:, 0], ((50, 4096),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_and_gradients_against_float64(gpu: torch.device, name: str, dtype: torch.dtype, error: Error) -> None:
    operation, exact, shapes = DIFFERENTIABLE[name]
    inputs = [torch.randn(shape, device=gpu).to(dtype).requires_grad_() for shape in shapes]
    out = operation(*inputs)
    grad = torch.randn(out.shape, device=gpu).to(out.dtype)
    out.backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = exact(*wide)
    want.backward(grad.double())  # type: ignore[no-untyped-call]
    limit = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}[dtype]
    assert error(out, want) < limit
    for ours, theirs in zip(inputs, wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert error(ours.grad, theirs.grad) < limit


def test_ops_without_a_sum_over_lanes_have_their_references_bits(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(60, 72, generator=generator).bfloat16(), torch.rand(15, 4, generator=generator)
    index = torch.randperm(60, generator=generator).to(torch.int32).view(15, 4)
    index[3, 2] = -1
    combined = moe_combine(rows.to(gpu), index.to(gpu), weights.to(gpu))
    assert torch.equal(combined.cpu(), moe_combine_reference(rows, index, weights))
    ids = torch.randint(0, 60, (7, 3), generator=generator)
    assert torch.equal(embedding(ids.to(gpu), rows.to(gpu)).cpu(), embedding_reference(ids, rows, 0))
    heads, cos, sin = rows.view(60, 3, 24), torch.randn(90, 12, generator=generator), torch.randn(90, 12, generator=generator)
    at = torch.randint(0, 90, (60,), generator=generator)
    slots = torch.randperm(80, generator=generator)[:60]
    keys, values = torch.zeros(2, 80, 3, 24, device=gpu, dtype=torch.bfloat16)
    into = CacheRows(keys, values, heads.to(gpu), slots.to(gpu))
    turned, _ = rope(*(t.to(gpu) for t in (heads, heads, cos, sin, at)), cache=into)
    assert torch.equal(turned.cpu(), rope_reference(heads, cos, sin, at, None, 1e-6))
    assert torch.equal(keys[into.slots], turned)
    assert torch.equal(values[into.slots], into.v)
    order, on_gpu = expert_order(ids, 60), expert_order(ids.to(gpu), 60)
    assert torch.equal(order.place, on_gpu.place.cpu())
    assert torch.equal(order.counts, on_gpu.counts.cpu())
    x = torch.randn(7, 72, generator=generator).bfloat16()
    assert torch.equal(expert_rows(x.to(gpu), on_gpu).cpu(), expert_rows(x, order))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router_and_its_gradient_against_the_reference(gpu: torch.device, scoring: str, error: Error) -> None:
    logits = (torch.randn(50, 64) * 4).round() / 4  # with ties
    rule = Rule(6, scoring)
    want, want_ids = router_reference(logits, None, None, rule)
    leaf = logits.to(gpu).requires_grad_()
    weights, ids = router(leaf, 6, scoring=scoring)  # type: ignore[arg-type]  # a literal
    assert torch.equal(ids.cpu(), want_ids)
    assert error(weights.cpu(), want) < 1e-6
    grad = torch.randn(50, 6)
    weights.backward(grad.to(gpu))  # type: ignore[no-untyped-call]  # torch's backward is untyped
    wide = logits.double().requires_grad_()
    scores = torch.softmax(wide, -1) if scoring == "softmax" else torch.sigmoid(wide)
    picked = scores.gather(1, want_ids.long())
    (picked / picked.sum(1, keepdim=True)).backward(grad.double())  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert wide.grad is not None
    assert error(leaf.grad.cpu(), wide.grad) < 1e-5


@pytest.mark.parametrize("heads", [(32, 8, 128, 128), (10, 2, 128, 128), (8, 8, 64, 64), (4, 4, 192, 128)])
def test_steep_prefill_gives_the_bits_of_decode(gpu: torch.device, heads: tuple[int, int, int, int]) -> None:
    """Scores far from even, so that maxima rise and rows are all negative; sequences that end within a block, and a window."""
    q_heads, kv_heads, d, dv = heads
    lengths = (1000, 1, 2500, 129, 1024)
    steep = torch.logspace(-1, 1.5, sum(lengths), device=gpu)[:, None, None]
    q = (torch.randn(sum(lengths), q_heads, d, device=gpu) * steep).bfloat16()
    k = (torch.randn(sum(lengths), kv_heads, d, device=gpu) - 0.5).bfloat16()
    v = torch.randn(sum(lengths), kv_heads, dv, device=gpu).bfloat16()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = torch.tensor([0, *ends], device=gpu, dtype=torch.int32)
    for window in (None, 300):
        whole, lse = attention_with_lse(q, k, v, q_starts=starts, max_q_len=max(lengths), window=window)
        assert not whole.isnan().any()
        for length, end in zip(lengths, ends, strict=True):
            row, keys = slice(end - 1, end), slice(end - length, end)
            lens = torch.tensor([length], device=gpu, dtype=torch.int32)
            alone, alone_lse = attention_with_lse(q[row], k[keys], v[keys], kv_lens=lens, window=window)
            assert torch.equal(alone, whole[row])
            assert torch.equal(alone_lse, lse[row])


@pytest.mark.parametrize("length", [130, 900, 5000, 20_000, 40_000])
@pytest.mark.parametrize("split", [False, True])
def test_the_most_rows_that_a_decode_takes_have_prefills_bits(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, split: bool, length: int
) -> None:
    """64 rows of the widest heads, beside which two blocks fit with half the values only: in one piece and in chunks, which are
    merged inside or by a kernel of their own."""
    heads, d, dv = 8, 192, 128
    q = torch.randn(100, heads, d, device=gpu).bfloat16()
    k, v = (torch.randn(length, heads, size, device=gpu).bfloat16() for size in (d, dv))
    lens = torch.tensor([length], device=gpu, dtype=torch.int32)
    want, want_lse = attention_with_lse(q, k, v, kv_lens=lens)
    monkeypatch.setattr(attention_module, "SPLIT_BELOW", 10**9 if split else 0)
    for rows in (1, 33, 64):
        out, lse = attention_with_lse(q[-rows:], k, v, kv_lens=lens)
        assert torch.equal(out, want[-rows:])
        assert torch.equal(lse, want_lse[-rows:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dv"), [(8, 2, 128, 128), (4, 4, 192, 128), (4, 2, 256, 256), (2, 1, 80, 80), (4, 1, 576, 512)]
)
def test_attention_gradients_against_float64(
    gpu: torch.device, error: Error, heads: int, kv_heads: int, d: int, dv: int
) -> None:
    n = 600
    q, k, v = (
        torch.randn(n, *size, device=gpu).bfloat16().requires_grad_() for size in ((heads, d), (kv_heads, d), (kv_heads, dv))
    )
    grad = torch.randn(n, heads, dv, device=gpu).bfloat16()
    out = attention(q, k, v)
    out.backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k64, v64))
    scores = torch.einsum("qhd,khd->hqk", q64, keys) * d**-0.5
    seen = torch.ones(n, n, device=gpu, dtype=torch.bool).tril()
    exact_out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -1e300).softmax(-1), values)
    exact_out.backward(grad.double())
    assert error(out, exact_out) < 6e-3
    for ours, exact in ((q, q64), (k, k64), (v, v64)):
        assert ours.grad is not None
        assert exact.grad is not None
        assert error(ours.grad, exact.grad) < 8e-3


@pytest.mark.parametrize("lengths", [(3000, 5000), (*range(40, 240),)])
def test_captured_calls_replay_with_the_same_bits(gpu: torch.device, lengths: tuple[int, ...]) -> None:
    """Ops that count in memory leave their counters as they found them, also where launches overlap: of a row's chunks that
    are done, or of rows that are taken where there are more than thread blocks."""
    x, weight = torch.randn(640, 2048, device=gpu).bfloat16(), torch.randn(6144, 2048, device=gpu).bfloat16()
    tile = replace(candidates(GemmProblem(640, 6144, 2048))[-1], overlap=2)
    q = torch.randn(len(lengths), 8, 128, device=gpu).bfloat16()
    k, v = (torch.randn(sum(lengths), 2, 128, device=gpu).bfloat16() for _ in range(2))
    starts = torch.arange(len(lengths) + 1, device=gpu, dtype=torch.int32)
    lens = torch.tensor(lengths, device=gpu, dtype=torch.int32)
    out = torch.empty(640, 6144, device=gpu, dtype=torch.bfloat16)

    def work() -> torch.Tensor:
        gemm(x, weight, out, tile=tile)
        return attention(q, k, v, q_starts=starts, kv_lens=lens, max_q_len=1, max_kv_len=5000)

    want = work().clone(), out.clone()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        graphs.append((graph, result))
    for graph, result in [*graphs, *graphs]:
        out.zero_()
        result.zero_()
        graph.replay()
        assert torch.equal(result, want[0])
        assert torch.equal(out, want[1])
    assert torch.equal(work(), want[0])


def test_results_of_more_elements_than_32_bits_count(gpu: torch.device) -> None:
    """The last rows alone: 65,536 rows of a product, 16,384 of a large vocabulary, and gradients of the vocabulary."""
    x, weight = (torch.randn(n, 64, device=gpu).bfloat16() for n in (65_536, 40_960))
    out = matmul(x, weight)
    assert out.numel() > 2**31
    assert torch.equal(out[-9:], matmul(x[-9:], weight))
    del out
    logits = torch.randn(16_384, 151_936, device=gpu, dtype=torch.bfloat16).requires_grad_()
    targets = torch.arange(16_384, device=gpu)
    few = logits.detach()[-9:].requires_grad_()
    for run in (log_prob, lambda logits, targets: scores(logits, targets)[: len(logits)]):
        whole, alone = run(logits, targets), run(few, targets[-9:])
        assert torch.equal(whole[-9:], alone)
        (gradient,) = torch.autograd.grad(whole.sum(), logits)
        assert torch.equal(gradient[-9:], torch.autograd.grad(alone.sum(), few)[0])
        del gradient


def test_unaligned_inputs_give_the_same_bits(gpu: torch.device) -> None:
    """Rows that TMA or vector loads cannot address take other kernels, not other sums."""
    storage = torch.randn(9 * 1030 + 3, device=gpu).bfloat16()
    x = storage[3 : 3 + 9 * 1030].view(9, 1030)[:, :1024]
    weight = torch.randn(512, 1024, device=gpu).bfloat16()
    assert torch.equal(matmul(x, weight), matmul(x.contiguous(), weight))
    scale = torch.randn(1024, device=gpu).bfloat16()
    assert torch.equal(rms_norm(x, scale), rms_norm(x.contiguous(), scale))  # type: ignore[arg-type]
    targets = torch.arange(9, device=gpu)
    assert torch.equal(log_prob(x, targets), log_prob(x.contiguous(), targets))


def test_the_benchmark_runs_a_users_shapes(gpu: torch.device, tmp_path: Path) -> None:
    shapes = [{"op": "matmul", "M": [1, 200], "N": 384, "K": 640}, {"op": "rms_norm", "rows": 8, "width": 256}]
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    command = [sys.executable, "-m", "benchmarks.kernels", "--shapes", "shapes.json", "--out", "out.json"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [record["same_bits"] for record in found["records"]] == [True] * 3
    assert all(record["us"]["ours"] > 0 for record in found["records"])
