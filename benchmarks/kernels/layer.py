"""A whole decoder layer of Qwen3-8B, forward: by this package's kernels, and with its products on cuBLAS and its attention on
torch's fastest backend. The rest (norms, rotation with the cache write, gating) is the same code in both, so the ratio is theirs.

As in the engines, the residual stream is carried beside the layer's output and added in the next norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import CacheRows, rope
from miles_plan.kernels.cuda.swiglu import swiglu

from .attentions import BACKENDS
from .gemms import LIBRARIES
from .record import OURS, Record
from .shapes import Shape
from .timing import Call, time_side_by_side

DEVICE = "cuda"
DECODE_LAYERS = 4  # one after another, as in a model: where a layer's weights happen to lie moves a decode step by up to 6 %
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER = 4096, 32, 8, 128, 12_288
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Attend = Callable[[torch.Tensor], torch.Tensor]
Stream = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Weights:
    """One layer's."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    head_norm: torch.Tensor

    @classmethod
    def random(cls) -> Weights:
        """Scaled so that activations keep their size."""

        def normal(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16).mul_(k**-0.5)

        return cls(
            normal((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN), normal(HIDDEN, HEADS * HEAD_SIZE), normal(2 * INNER, HIDDEN),
            normal(HIDDEN, INNER), torch.ones(HIDDEN, device=DEVICE, dtype=torch.bfloat16),
            torch.ones(HEAD_SIZE, device=DEVICE, dtype=torch.bfloat16),
        )  # fmt: skip


class Layer:
    """Sequences of one length with their caches: `q_len` new tokens each, `kv_len` with them."""

    def __init__(self, batch: int, q_len: int, kv_len: int) -> None:
        self.batch, self.q_len, self.kv_len = batch, q_len, kv_len
        self.w = Weights.random()
        tokens = batch * q_len
        self.hidden, self.residual = (torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        cache = (batch * kv_len, KV_HEADS, HEAD_SIZE)
        self.k = torch.randn(cache, device=DEVICE, dtype=torch.bfloat16)
        self.v = torch.randn(cache, device=DEVICE, dtype=torch.bfloat16)
        new = torch.arange(kv_len - q_len, kv_len, device=DEVICE)
        self.positions = new.repeat(batch)
        self.slots = (torch.arange(batch, device=DEVICE)[:, None] * kv_len + new).reshape(-1)
        angles = torch.arange(kv_len, device=DEVICE)[:, None] / 1e6 ** (
            torch.arange(0, HEAD_SIZE, 2, device=DEVICE) / HEAD_SIZE
        )
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.q_starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * q_len
        self.kv_starts = torch.arange(batch, device=DEVICE, dtype=torch.int32) * kv_len
        self.kv_lens = torch.full((batch,), kv_len, device=DEVICE, dtype=torch.int32)

    def forward(self, chain: Product, tree: Product, attend: Attend, rows: slice | None = None) -> Stream:
        """The layer on all tokens, or on `rows` of them (then `attend` must fit): its output and the residual stream to add it to.

        Writes the new keys and values.
        """
        here = slice(None) if rows is None else rows
        normal, residual = rms_norm(self.hidden[here], self.w.norm, 1e-6, self.residual[here])
        qkv = chain(normal, self.w.qkv).view(normal.shape[0], -1, HEAD_SIZE)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        q, _ = rope(
            q, k, self.cos, self.sin, self.positions[here], q_norm=self.w.head_norm, k_norm=self.w.head_norm,
            cache=CacheRows(self.k, self.v, v, self.slots[here]),
        )  # fmt: skip
        out = tree(attend(q).reshape(normal.shape[0], -1), self.w.o)
        normal, residual = rms_norm(out, self.w.norm, 1e-6, residual)
        return tree(swiglu(chain(normal, self.w.gate_up)), self.w.down), residual

    def ours(self) -> Stream:
        """By this package."""

        def attend(q: torch.Tensor) -> torch.Tensor:
            return attention(
                q, self.k, self.v, q_starts=self.q_starts, kv_starts=self.kv_starts, kv_lens=self.kv_lens,
                max_q_len=self.q_len, max_kv_len=self.kv_len,
            )  # fmt: skip

        return self.forward(matmul, _tree, attend)

    def alone(self, row: int) -> Stream:
        """The last token of sequence `row` as a decode step of its own; its cache is as `ours` left it."""
        first = row * self.kv_len
        lens = self.kv_lens[:1].contiguous()

        def attend(q: torch.Tensor) -> torch.Tensor:
            return attention(q, self.k[first:], self.v[first:], kv_lens=lens, max_q_len=1, max_kv_len=self.kv_len)

        last = (row + 1) * self.q_len - 1
        return self.forward(matmul, _tree, attend, slice(last, last + 1))

    def baseline(self, backend: SDPBackend) -> Stream:
        """On cuBLAS and one of torch's attention backends."""

        def attend(q: torch.Tensor) -> torch.Tensor:
            q = q.view(self.batch, self.q_len, HEADS, HEAD_SIZE).transpose(1, 2)
            k, v = (x.view(self.batch, self.kv_len, KV_HEADS, HEAD_SIZE).transpose(1, 2) for x in (self.k, self.v))
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.q_len > 1, enable_gqa=True)
            return out.transpose(1, 2).reshape(-1, HEADS, HEAD_SIZE)

        return self.forward(_linear, _linear, attend)


def _tree(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return matmul(x, weight, order="tree")


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())


def measure_layer(shape: Shape) -> Record:
    """Layers with chain and tree products against cuBLAS or cuBLASLt with cuDNN or flash attention, the fastest pair."""
    layers = [
        Layer(shape["batch"], shape["q_len"], shape["kv_len"]) for _ in range(DECODE_LAYERS if shape["q_len"] == 1 else 1)
    ]
    layer = layers[0]
    contenders: dict[str, list[Call]] = {OURS: [each.ours for each in layers]}
    before: dict[str, Call] = {}
    for backend in BACKENDS:
        try:
            layer.baseline(BACKENDS[backend])
        except RuntimeError:
            continue
        for library, select in LIBRARIES.items():
            contenders[f"{library} + {backend}"] = [partial(each.baseline, BACKENDS[backend]) for each in layers]
            before[f"{library} + {backend}"] = select
    record = Record(shape, time_side_by_side(contenders, before=before, budget_ms=4.0))
    whole = layer.ours()
    row = layer.batch // 2
    last = (row + 1) * layer.q_len - 1
    record.same_bits = all(torch.equal(a[0], b[last]) for a, b in zip(layer.alone(row), whole, strict=True))
    return record
