"""On a GPU: invariance by `verify`, gradients and accuracy against float64, CUDA graphs, several GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miles_plan.kernels.cuda import verify as verify_module
from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.gemm import gemm
from miles_plan.kernels.cuda.log_prob import log_prob
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.tuning import GemmProblem, candidates
from miles_plan.kernels.cuda.verify import CHECKS, Check, Draw, verify

pytestmark = pytest.mark.gpu
Error = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_draws(check: Check, gpu: torch.device) -> None:
    for dtype in check.dtypes:
        for seed in range(3):
            assert check.run(Draw(seed, gpu), dtype) == 0, (dtype, seed)


def test_verify_names_the_op_that_differs_first(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(draw: Draw, dtype: torch.dtype) -> int:
        x = draw.normal(300, 4096, dtype=dtype)
        return verify_module.differing(x @ x.T, torch.stack([row @ x.T for row in x]))  # cuBLAS, row by row

    bf16 = (torch.bfloat16,)
    fine = next(check for check in CHECKS if check.name == "swiglu")
    monkeypatch.setattr(verify_module, "CHECKS", (fine, Check("cublas", differs, bf16), Check("again", differs, bf16)))
    report = verify(seconds=0.0, least_draws=1)
    assert not report.ok
    assert report.first is not None
    assert report.first.op == "cublas"
    assert "first to differ: cublas (bfloat16)" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_gives_the_portable_kernels_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    for problem in (GemmProblem(1, 512, 1024, dtype, dtype), GemmProblem(700, 6144, 512, dtype, dtype)):
        x = torch.randn(problem.m, problem.k, device=gpu).to(dtype)
        weight = (torch.randn(problem.n, problem.k, device=gpu) / 30).to(dtype)
        want = torch.empty(problem.m, problem.n, device=gpu, dtype=dtype)
        gemm(x, weight, want, portable=True)
        tiles = candidates(problem, torch.cuda.get_device_properties(gpu).multi_processor_count)
        assert problem.m == 1 or any(tile.stream for tile in tiles)
        for tile in tiles[:: 1 if problem.m > 1 else 3]:
            out = torch.full_like(want, float("nan"))
            for _ in range(3):  # flags must be left as they were found
                gemm(x, weight, out, tile=tile)
                assert torch.equal(out, want), tile


@pytest.mark.parametrize(("m", "n", "k"), [(64, 512, 4096), (700, 1024, 2048)])
def test_products_are_no_less_accurate_than_cublas(gpu: torch.device, m: int, n: int, k: int, error: Error) -> None:
    x, weight = torch.randn(m, k, device=gpu).bfloat16(), (torch.randn(n, k, device=gpu) / k**0.5).bfloat16()
    exact = x.double() @ weight.double().T
    theirs = error(torch.mm(x, weight.T), exact)
    for order in ("chain", "tree"):
        assert error(matmul(x, weight, order=order), exact) <= theirs * 1.01  # type: ignore[arg-type]


def test_attention_gradients_against_float64(gpu: torch.device, error: Error) -> None:
    n, heads, kv_heads, d = 600, 8, 2, 128
    q, k, v = (torch.randn(n, h, d, device=gpu).bfloat16().requires_grad_() for h in (heads, kv_heads, kv_heads))
    grad = torch.randn(n, heads, d, device=gpu).bfloat16()
    attention(q, k, v).backward(grad)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k64, v64))
    scores = torch.einsum("qhd,khd->hqk", q64, keys) * d**-0.5
    seen = torch.ones(n, n, device=gpu, dtype=torch.bool).tril()
    torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -1e300).softmax(-1), values).backward(grad.double())
    for ours, exact in ((q, q64), (k, k64), (v, v64)):
        assert ours.grad is not None
        assert exact.grad is not None
        assert error(ours.grad, exact.grad) < 8e-3


def test_captured_calls_replay_with_the_same_bits(gpu: torch.device) -> None:
    """Ops that count in memory (split decode, handed-over accumulators) leave their counters as they found them."""
    x, weight = torch.randn(640, 2048, device=gpu).bfloat16(), torch.randn(6144, 2048, device=gpu).bfloat16()
    tile = next(t for t in candidates(GemmProblem(640, 6144, 2048)) if t.stream)
    q = torch.randn(2, 8, 128, device=gpu).bfloat16()
    k, v = (torch.randn(8000, 2, 128, device=gpu).bfloat16() for _ in range(2))
    starts = torch.tensor([0, 1, 2], device=gpu, dtype=torch.int32)
    lens = torch.tensor([3000, 5000], device=gpu, dtype=torch.int32)
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
