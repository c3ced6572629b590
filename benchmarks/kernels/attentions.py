"""Timing and checking attention: prefill, chunked prefill and decode, packed or paged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from miles_plan.kernels.cuda.attention import attention

from .record import OURS, Record, relative_error
from .shapes import Shape
from .timing import Call, copies, time_side_by_side

DEVICE = "cuda"
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Batch:
    """Sequences of equal length: `q_len` queries at the end of `kv_len` keys each."""

    def __init__(self, shape: Shape, keys_and_values: int = 1) -> None:
        self.batch, self.q_len, self.kv_len = shape["batch"], shape["q_len"], shape["kv_len"]
        self.heads, self.kv_heads, self.d = shape["heads"], shape["kv_heads"], shape["head_size"]
        self.page, self.window = shape["page"], shape["window"] or None
        dtype = getattr(torch, shape["dtype"])
        new = {"device": DEVICE, "dtype": dtype}
        self.q = torch.randn(self.batch * self.q_len, self.heads, self.d, **new)
        keys = self.batch * self.kv_len
        self.kv = [
            (torch.randn(keys, self.kv_heads, self.d, **new), torch.randn(keys, self.kv_heads, self.d, **new))
            for _ in range(keys_and_values)
        ]
        self.q_starts = torch.arange(self.batch + 1, device=DEVICE, dtype=torch.int32) * self.q_len
        self.kv_starts = torch.arange(self.batch, device=DEVICE, dtype=torch.int32) * self.kv_len
        self.kv_lens = torch.full((self.batch,), self.kv_len, device=DEVICE, dtype=torch.int32)
        self.table: torch.Tensor | None = None
        if self.page:
            if self.kv_len % self.page:
                raise ValueError(f"kv_len is {self.kv_len}; allowed with a page: a multiple of it, {self.page}")
            pages = torch.randperm(keys // self.page, device=DEVICE).to(torch.int32)
            self.table = pages.view(self.batch, -1)

    def ours(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The whole batch by this package; with a page, the keys lie scattered as the table says."""
        options: dict[str, Any] = {"q_starts": self.q_starts, "kv_lens": self.kv_lens, "window": self.window}
        options |= {"max_q_len": self.q_len, "max_kv_len": self.kv_len}
        if self.table is not None:
            k, v = (x.view(-1, self.page, self.kv_heads, self.d) for x in (k, v))
            return attention(self.q, k, v, page_table=self.table, **options)
        return attention(self.q, k, v, kv_starts=self.kv_starts, **options)

    def gathered(self, x: torch.Tensor, sequence: int) -> torch.Tensor:
        """One sequence's keys or values in order, [kv_len, kv_heads, d]."""
        if self.table is None:
            return x[sequence * self.kv_len : (sequence + 1) * self.kv_len]
        pages = x.view(-1, self.page, self.kv_heads, self.d)
        return pages[self.table[sequence].long()].flatten(0, 1)

    def sdpa(self, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> Callable[[], torch.Tensor]:
        """torch's attention over the same values, heads before tokens as it likes them, never paged."""
        q = self.q.view(self.batch, self.q_len, self.heads, self.d).transpose(1, 2)
        k, v = (x.view(self.batch, self.kv_len, self.kv_heads, self.d).transpose(1, 2) for x in (k, v))
        if self.q_len > 1:
            q, k, v = (x.contiguous() for x in (q, k, v))
        causal = self.q_len == self.kv_len

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return call

    @property
    def comparable(self) -> bool:
        """Whether torch's attention can say the same: no window, and one query or as many as keys."""
        return self.window is None and self.q_len in (1, self.kv_len)


def baselines(batch: Batch) -> dict[str, list[Call]]:
    """Every backend of torch's attention that can say the same and runs, and FlashAttention-3 where it is installed."""
    found: dict[str, list[Call]] = {}
    for name, backend in BACKENDS.items() if batch.comparable else ():
        calls: list[Call] = [batch.sdpa(k, v, backend) for k, v in batch.kv]
        try:
            calls[0]()
        except RuntimeError:
            continue
        found[name] = calls
    flash3 = _flash_attention_3(batch)
    if flash3:
        found["flash_attention_3"] = flash3
    return found


def _flash_attention_3(batch: Batch) -> list[Call] | None:
    """FlashAttention-3 of its own package or of sgl-kernel, with its own choice of splits; None where neither runs."""
    for calls in (_flash_attention_3_calls, _sgl_kernel_calls):
        try:
            found = calls(batch)
            found[0]()
        except (ImportError, RuntimeError, NotImplementedError):
            continue
        return found
    return None


def _flash_attention_3_calls(batch: Batch) -> list[Call]:
    from flash_attn_interface import flash_attn_func

    shape, window = (batch.batch, -1), _keys_before(batch)
    q = batch.q.view(*shape, batch.heads, batch.d)
    pairs = [tuple(x.view(*shape, batch.kv_heads, batch.d) for x in kv) for kv in batch.kv]
    return [lambda k=k, v=v: flash_attn_func(q, k, v, causal=True, window_size=window) for k, v in pairs]


def _sgl_kernel_calls(batch: Batch) -> list[Call]:
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    k_starts = torch.arange(batch.batch + 1, device=DEVICE, dtype=torch.int32) * batch.kv_len
    sizes, window = (batch.q_starts, k_starts, batch.q_len, batch.kv_len), _keys_before(batch)

    def call(k: torch.Tensor, v: torch.Tensor) -> Any:
        return flash_attn_varlen_func(batch.q, k, v, *sizes, causal=True, window_size=window, num_splits=0)

    return [partial(call, k, v) for k, v in batch.kv]


def _keys_before(batch: Batch) -> tuple[int, int]:
    """FlashAttention's window: keys before a query's own, and after it; -1 for all."""
    return (-1, -1) if batch.window is None else (batch.window - 1, 0)


def measure_attention(shape: Shape) -> Record:
    """Attention against the fastest of torch's backends and FlashAttention-3."""
    dtype = getattr(torch, shape["dtype"])
    kv_bytes = 2 * shape["batch"] * shape["kv_len"] * shape["kv_heads"] * shape["head_size"] * dtype.itemsize
    batch = Batch(shape, copies(kv_bytes, 4) if shape["q_len"] == 1 else 1)
    contenders: dict[str, list[Call]] = {OURS: [lambda k=k, v=v: batch.ours(k, v) for k, v in batch.kv]}  # type: ignore[misc]  # a default binds the loop's value
    contenders |= baselines(batch)
    record = Record(shape, time_side_by_side(contenders))
    if batch.q_len == 1:
        record.moved_bytes = kv_bytes
    else:
        pairs = batch.q_len * (batch.kv_len - (batch.q_len - 1) / 2)
        record.flop = 4.0 * batch.batch * batch.heads * batch.d * pairs
    whole = batch.ours(*batch.kv[0])
    sequence = batch.batch // 2
    record.same_bits, last = _alone(batch, sequence, whole)
    record.error = relative_error(whole[last], _exact_row(batch, sequence, last))
    if comparable := [name for name in contenders if name in BACKENDS]:
        name = min(comparable, key=lambda name: record.us[name])
        theirs = batch.sdpa(*batch.kv[0], BACKENDS[name])()
        if batch.table is None:
            record.baseline_error = relative_error(theirs[sequence, :, -1], _exact_row(batch, sequence, last))
    return record


def _alone(batch: Batch, sequence: int, whole: torch.Tensor) -> tuple[bool, int]:
    """The last query of one sequence as a decode step of its own, over packed keys; and its row in the batch."""
    last = (sequence + 1) * batch.q_len - 1
    k, v = (batch.gathered(x, sequence) for x in batch.kv[0])
    lens = torch.tensor([batch.kv_len], device=DEVICE, dtype=torch.int32)
    alone = attention(batch.q[last : last + 1], k, v, kv_lens=lens, max_q_len=1, max_kv_len=batch.kv_len, window=batch.window)
    return torch.equal(alone[0], whole[last]), last


def _exact_row(batch: Batch, sequence: int, row: int) -> torch.Tensor:
    """The last query of a sequence in float64, [heads, d]."""
    k, v = (batch.gathered(x, sequence).double() for x in batch.kv[0])
    if batch.window is not None:
        k, v = k[-batch.window :], v[-batch.window :]
    group = batch.heads // batch.kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,khd->hk", batch.q[row].double(), k) * batch.d**-0.5, -1)
    return torch.einsum("hk,khd->hd", weights, v)
