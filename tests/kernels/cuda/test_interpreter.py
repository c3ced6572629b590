"""The Triton kernels themselves on a CPU, in Triton's interpreter, against the references: every kernel that is not
warp-specialised (those need Hopper and are covered by the GPU tests)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def _run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(code)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    return subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """Where scripts go; skips where Triton is missing, or where its interpreter cannot run a loop (3.6 with numpy 2.4)."""
    pytest.importorskip("triton", reason="Triton, whose interpreter runs the kernels, is not installed")
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 7) and tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with numpy {np.__version__}")
    return tmp_path


HEAD = """
import torch, warnings
warnings.filterwarnings("ignore")
torch.manual_seed(0)
def rel(a, b):
    return ((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()).item()
"""
SCRIPTS = {
    "matmul": """
from miles_plan.kernels.cuda.matmul import matmul, matmul_reference, tree_partial
from miles_plan.kernels.cuda.tensor_core import add_tree
for dtype, limit in ((torch.float16, 1e-3), (torch.float32, 1e-6)):
    x, w = torch.randn(5, 256, dtype=dtype, requires_grad=True), (torch.randn(72, 256) / 16).to(dtype).requires_grad_()
    for order in ("chain", "tree"):
        y = matmul(x, w, order=order)
        y.backward(g := torch.randn_like(y))
        assert rel(y, matmul_reference(x, w, 8 if order == "tree" else 0)) < limit
        assert rel(x.grad, g.double() @ w.double()) < limit and rel(w.grad, g.double().T @ x.double()) < limit
        x.grad = w.grad = None
x, w = x.detach(), w.detach()
parts = [tree_partial(x[:, i * 64 : (i + 1) * 64].contiguous(), w[:, i * 64 : (i + 1) * 64].contiguous(), 4) for i in range(4)]
assert torch.equal(add_tree(parts), matmul(x, w, order="tree"))
assert torch.equal(matmul(x[2:3], w), matmul(x, w)[2:3])
""",
    "experts": """
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul, grouped_matmul_reference
from miles_plan.kernels.cuda.moe_combine import moe_combine, moe_combine_reference
from miles_plan.kernels.cuda.router import Rule, router, router_reference
import miles_plan.kernels.cuda.fp8_matmul as fp8
counts = torch.tensor([3, 0, 70, 1], dtype=torch.int32)
x, w = torch.randn(74, 64, dtype=torch.float16, requires_grad=True), (torch.randn(4, 40, 64) / 8).half().requires_grad_()
y = grouped_matmul(x, w, counts)
y.backward(g := torch.randn_like(y))
assert rel(y, grouped_matmul_reference(x, w, counts)) < 1e-3
for e, (rows, grads) in enumerate(zip(x.split(counts.tolist()), g.split(counts.tolist()))):
    assert len(rows) == 0 or rel(w.grad[e], grads.double().T @ rows.double()) < 1e-3
rows, weights = torch.randn(30, 72).half(), torch.rand(6, 4)
index = torch.randperm(30)[:24].int().view(6, 4).contiguous()
index[2, 1] = -1
assert torch.equal(moe_combine(rows, index, weights), moe_combine_reference(rows, index, weights))
leaves = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
moe_combine(leaves[0], index, leaves[1]).backward(g := torch.randn(6, 72).half())
wide = [rows.double().requires_grad_(), weights.double().requires_grad_()]
(wide[0][index.clamp(min=0).long()] * (wide[1] * (index >= 0))[..., None]).sum(1).backward(g.double())
assert rel(leaves[0].grad, wide[0].grad) < 1e-3 and rel(leaves[1].grad, wide[1].grad) < 1e-5
from miles_plan.kernels.cuda.router import _reference_gradient
for scoring in ("softmax", "sigmoid"):
    leaf = torch.randn(5, 24).requires_grad_()
    found, ids = router(leaf, 4, scoring=scoring, scale=2.5)
    found.backward(g := torch.randn(5, 4))
    assert rel(leaf.grad, _reference_gradient(leaf.detach(), ids, g, Rule(4, scoring, scale=2.5))) < 1e-5
logits = torch.randn(5, 32)
logits[0, 3] = logits[0, 9]
for options in ({}, {"scoring": "sigmoid", "bias": torch.randn(32) / 10, "groups": 8, "groups_kept": 3}):
    got = router(logits, 6, **options)
    rule = Rule(6, **{name: value for name, value in options.items() if name != "bias"})
    want = router_reference(logits, options.get("bias"), None, rule)
    assert torch.equal(got[1], want[1]) and rel(got[0], want[0]) < 1e-6
    again = router(logits, 6, **options, ids=got[1].flip(1).contiguous())
    assert torch.equal(again[0].flip(1), got[0]), "the order in which experts are given does not show"
x, w = torch.randn(70, 256), torch.randn(144, 256) / 16
values, scales = fp8.quantize_rows(x)
want = fp8._quantize_reference(x)
assert torch.equal(scales, want[1])
exact = want[0].float()  # the interpreter loses carries when it rounds to FP8: a few values come out at half their size
assert rel(values.float(), exact) < 0.1 and (values.float() != exact).float().mean() < 0.05
pair = fp8.quantize_weight(w)
assert rel(fp8.fp8_matmul(values, scales, *pair), fp8.fp8_matmul_reference(values, scales, *pair)) < 5e-3
""",
    "attention": """
import miles_plan.kernels.cuda.attention as A
A.CHUNK_KEYS = 256
cases = ((40, 40, 4, 2, 64, None), (1, 700, 4, 1, 64, None), (1, 520, 4, 2, 64, 100), (3, 270, 2, 1, 192, None))
for n, length, heads, kv_heads, d, window in cases:
    q, k = torch.randn(n, heads, d).half(), torch.randn(length, kv_heads, d).half()
    v = torch.randn(length, kv_heads, min(d, 128)).half()
    lens = torch.tensor([length], dtype=torch.int32)
    out, lse = A.attention_with_lse(q, k, v, kv_lens=lens, window=window)
    call = A._check(q, k, v, torch.tensor([0, n], dtype=torch.int32), None, lens, None, None, None, True, window, None)
    want, want_lse = A.attention_reference(call)
    assert rel(out, want) < 1e-3 and (lse - want_lse / A.LOG2_E).abs().max() < 1e-5
q, k, v = (torch.randn(70, h, 32).half().requires_grad_() for h in (4, 2, 2))
starts = torch.tensor([0, 30, 70], dtype=torch.int32)
out = A.attention(q, k, v, q_starts=starts)
out.backward(g := torch.randn_like(out))
lens = starts[1:] - starts[:-1]
given = [x.detach() for x in (q, k, v)]
lse = A._forward(A._check(*given, starts, None, None, None, None, None, True, None, None), True)[1]
want = A._reference_gradients(
    g, *given, out.detach(), lse, starts, starts[:-1], lens, 40, 40, True, A.NO_WINDOW, 32**-0.5
)
assert all(rel(a.grad, b) < 3e-3 for a, b in zip((q, k, v), want))
""",
    "rows": """
from miles_plan.kernels.cuda.rms_norm import rms_norm, rms_norm_reference
from miles_plan.kernels.cuda.rope import CacheRows, rope, rope_reference
from miles_plan.kernels.cuda.swiglu import swiglu, swiglu_reference
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.sample import sample, sample_reference
import miles_plan.kernels.cuda.log_prob as lp
x, residual, w = torch.randn(70, 96).half().requires_grad_(), torch.randn(70, 96).half(), torch.randn(96).half()
w.requires_grad_()
y, total = rms_norm(x, w, 1e-6, residual)
assert rel(y, rms_norm_reference(x, w, 1e-6, residual)[0]) < 1e-3
y.backward(g := torch.randn_like(y))
t64, w64 = total.detach().double().requires_grad_(), w.detach().double().requires_grad_()
torch.nn.functional.rms_norm(t64, (96,), w64, 1e-6).backward(g.double())
assert rel(x.grad, t64.grad) < 1e-3 and rel(w.grad, w64.grad) < 1e-3
from miles_plan.kernels.cuda import rms_norm as module
x, residual, w = (torch.randn(*shape).half() for shape in ((19, 96), (19, 96), (96,)))
one = rms_norm(x, w, 1e-6, residual)
module.FEWEST_PROGRAMS = 1
assert module._rows_of_a_program(19, 128) == 16  # the second program has three
assert all(map(torch.equal, rms_norm(x, w, 1e-6, residual), one))
for rows in (1, 32, 33, 70):
    partial, out, want = torch.randn(rows, 40), torch.empty(40), torch.zeros(40)
    module.ordered_sum_kernel[(2,)](partial, out, rows, WIDTH=40, BLOCK=32, AT_ONCE=32, num_warps=1)
    for row in partial:
        want = want + row
    assert torch.equal(out, want), "in ascending order, whatever is under way together"
q, k, norm = torch.randn(7, 10, 32).half(), torch.randn(7, 3, 32).half(), torch.randn(32).half()
cos, sin, at = torch.randn(50, 16), torch.randn(50, 16), torch.randint(0, 50, (7,))
assert rel(rope(q, k, cos, sin, at, q_norm=norm, k_norm=norm)[0], rope_reference(q, cos, sin, at, norm, 1e-6)) < 1e-3
assert rel(rope(q, k, cos, sin, at)[1], rope_reference(k, cos, sin, at, None, 1e-6)) < 1e-3
keys, values = torch.zeros(2, 13, 3, 32).half()
v, slots = torch.randn(7, 3, 32).half(), torch.randperm(13)[:7]
turned = rope(q, k, cos, sin, at, q_norm=norm, k_norm=norm, cache=CacheRows(keys, values, v, slots))
assert all(torch.equal(a, b) for a, b in zip(turned, rope(q, k, cos, sin, at, q_norm=norm, k_norm=norm)))
assert torch.equal(keys[slots], turned[1]) and torch.equal(values[slots], v)
keys[slots], values[slots] = 0, 0
assert not keys.any() and not values.any()
q.requires_grad_()
rope(q, k, cos, sin, at)[0].backward(g := torch.randn(7, 10, 32).half())
assert rel(q.grad, rope_reference(g, cos, -sin, at, None, 1e-6)) < 1e-3
x = torch.randn(5, 200).half().requires_grad_()
assert rel(swiglu(x), swiglu_reference(x.detach())) < 1e-3
swiglu(x).backward(g := torch.randn(5, 100).half())
wide = x.detach().double().requires_grad_()
(torch.nn.functional.silu(wide[:, :100]) * wide[:, 100:]).backward(g.double())
assert rel(x.grad, wide.grad) < 1e-3
weight, ids = torch.randn(20, 24).half(), torch.randint(0, 20, (3, 9))
assert torch.equal(embedding(ids, weight[:12].contiguous()) + embedding(ids, weight[12:].contiguous(), 12), weight[ids])
table = torch.randn(20, 24).half().requires_grad_()
embedding(ids, table).backward(g := torch.randn(3, 9, 24).half())
wide = table.detach().double().requires_grad_()
torch.nn.functional.embedding(ids, wide).backward(g.double())
assert rel(table.grad, wide.grad) < 1e-3
logits = (torch.randn(6, 9000) * 2).half()
seeds, positions = torch.randint(0, 2**62, (6,)), torch.randint(0, 2**40, (6,))
for temperature in (0, 1.0, 0.7):
    want = sample_reference(logits, seeds, positions, temperature)
    assert torch.equal(sample(logits, seeds, positions, temperature=temperature), want)
each = torch.tensor([0.7, 1.0, 0.85, 1.1, 0.9, 1.3])
one_by_one = [sample(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], temperature=float(each[i])) for i in range(6)]
assert torch.equal(sample(logits, seeds, positions, temperature=each), torch.cat(one_by_one))
for vocab in (2048, 1000, 5000 * 16):
    x = (torch.randn(3, vocab) * 4).half().requires_grad_()
    t = torch.randint(0, vocab, (3,))
    y = lp.log_prob(x, t, temperature=0.7)
    y.backward(g := torch.randn(3))
    wide = x.detach().double().requires_grad_()
    torch.log_softmax(wide / 0.7, -1).gather(1, t[:, None])[:, 0].backward(g.double())
    assert rel(x.grad, wide.grad) < 2e-3
    x.grad = None
    assert (y - torch.log_softmax(x.double() / 0.7, -1).gather(1, t[:, None])[:, 0]).abs().max() < 1e-5
    table = lp.log_softmax(x, temperature=0.7)
    assert torch.equal(table.detach().gather(1, t[:, None])[:, 0], y)
    g, wide = torch.randn_like(table), x.detach().double().requires_grad_()
    table.backward(g)
    torch.log_softmax(wide / 0.7, -1).backward(g.double())
    assert rel(x.grad, wide.grad) < 1e-3
    each = torch.tensor([0.7, 0.85, 1.1])
    one_by_one = [lp.log_prob(x.detach()[i : i + 1], t[i : i + 1], temperature=float(each[i])) for i in range(3)]
    assert torch.equal(lp.log_prob(x.detach(), t, temperature=each), torch.cat(one_by_one))
    certain = x.detach().clone()
    certain[torch.arange(3), t] = torch.tensor([80.0, 90.0, 100.0]).half()
    assert lp.log_prob(certain, t).max() == 0 and lp.log_softmax(certain).max() == 0
    if vocab % 16 == 0:
        shards = [shard.contiguous() for shard in x.detach().chunk(4, 1)]
        parts = [lp.log_prob_partials(shard, vocab, 0.7) for shard in shards]
        m, s = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
        assert torch.equal(lp.combine_log_prob(m, s, lp._chosen(x.detach(), t, 0), 0.7)[0], y)
""",
    "scores": """
from miles_plan.kernels.cuda import vocab_scores as vs
for dtype, columns, padded, first, temperature in (
    (torch.float32, 4999, 5000, 0, 1.0), (torch.float16, 200, 300, 100, 0.7), (torch.bfloat16, 4096, 4096, 2048, 2.0),
):
    logits = (torch.randn(5, padded) * 5).to(dtype)
    logits[:, columns:] = 1000.0
    targets, (g, h) = torch.randint(0, first + columns + 300, (5,)), torch.randn(2, 5)
    targets[0] = first + 3
    found = []
    for vs.runs_triton in (lambda _: True, lambda _: False):
        top, (s, w, x) = vs.row_statistics(logits, targets, first=first, columns=columns, temperature=temperature)
        entropy, where = s.log() - w / s, dict(first=first, columns=columns, temperature=temperature)
        gradient = vs.scores_gradient(logits, targets, top + s.log(), entropy, g, h, **where)
        found.append((top, s, w, x, entropy, gradient))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5 if one.dtype == torch.float32 else 1e-2)
    assert not found[0][-1][:, columns:].any()
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_kernels_agree_with_their_references(name: str, interpreter: Path) -> None:
    done = _run(HEAD + SCRIPTS[name], interpreter)
    assert done.returncode == 0, done.stderr[-3000:]
