from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_plan.kernels import attention
from miles_plan.kernels.attention import (
    PreparedKeyValue,
    pack_sequences,
    packed_attention,
    paged_attention,
    prepare_keys_values,
)

HEADS, KV_HEADS, HEAD_DIM, MAX_CONTEXT = 4, 2, 16, 4096
SCALE = HEAD_DIM**-0.5


def inputs(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator) * 2
    k, v = (torch.randn(num_tokens, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    v = v * torch.logspace(-3, 3, num_tokens)[:, None, None]  # values of very different size
    return q.to(dtype), k.to(dtype), v.to(dtype)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return packed_attention(q, k, v, pack_sequences(lengths), scale=SCALE, max_context=MAX_CONTEXT)


def fill_pool(k: Tensor, v: Tensor, lengths: list[int], page_tokens: int) -> tuple[PreparedKeyValue, Tensor]:
    """Keys and values of packed sequences spread over shuffled pages whose other slots hold rubbish, and the page table."""
    prepared = prepare_keys_values(k, v)
    pages_of = [-(-length // page_tokens) for length in lengths]
    shape = (sum(pages_of) + 1, KV_HEADS, page_tokens)
    pool = PreparedKeyValue(
        torch.full((*shape, HEAD_DIM), 1e30, dtype=torch.float64),
        torch.full((*shape, HEAD_DIM), -1.0, dtype=torch.float64),
        torch.full(shape, 2.0**100, dtype=torch.float64),
    )
    order = iter((torch.randperm(sum(pages_of), generator=torch.Generator().manual_seed(3)) + 1).tolist())
    table = torch.zeros(len(lengths), max(pages_of), dtype=torch.int64)
    start = 0
    for row, length in enumerate(lengths):
        for number in range(pages_of[row]):
            page = table[row, number] = next(order)
            own = slice(start + number * page_tokens, start + min(length, (number + 1) * page_tokens))
            used = own.stop - own.start
            pool.keys[page, :, :used] = prepared.keys[own].transpose(0, 1)
            pool.values[page, :, :used] = prepared.values[own].transpose(0, 1)
            pool.value_scale[page, :, :used] = prepared.value_scale[own].transpose(0, 1)
        start += length
    return pool, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_tokens", [1, 5, 16])
def test_decode_and_chunks_equal_the_packed_forward(page_tokens: int, dtype: torch.dtype) -> None:
    lengths = [1, 9, 33, 64]
    q, k, v = inputs(sum(lengths), dtype)
    expected = packed(q, k, v, lengths)
    pool, table = fill_pool(k, v, lengths, page_tokens)
    ends = torch.tensor(lengths).cumsum(0) - 1
    decoded = paged_attention(q[ends][:, None], pool, table, torch.tensor(lengths) - 1, scale=SCALE, max_context=MAX_CONTEXT)
    assert torch.equal(decoded[:, 0], expected[ends])
    for chunk in (1, 7, 64):
        for start in range(0, 64, chunk):
            own = q[-64:][start : start + chunk][None]
            chunked = paged_attention(own, pool, table[-1:], torch.tensor([start]), scale=SCALE, max_context=MAX_CONTEXT)
            assert torch.equal(chunked[0], expected[-64:][start : start + chunk])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_neighbours_and_later_tokens_do_not_matter(lengths: list[int]) -> None:
    q, k, v = inputs(sum(lengths))
    whole = packed(q, k, v, lengths).split(lengths)
    start = 0
    for length, together in zip(lengths, whole, strict=True):
        own = slice(start, start + length)
        assert torch.equal(packed(q[own], k[own], v[own], [length]), together)
        prefix = slice(start, start + (length + 1) // 2)
        assert torch.equal(packed(q[prefix], k[prefix], v[prefix], [prefix.stop - start]), together[: prefix.stop - start])
        start += length


def test_sums_over_keys_are_exact() -> None:
    q, k, v = inputs(257)
    k[1:256:2] = k[:256:2]  # pairs of keys with equal weights
    v[:256:2] = torch.randn(v[1:256:2].shape, generator=torch.Generator().manual_seed(4)) * 1e4
    v[1:256:2] = -v[:256:2]  # and opposite values: the sum cancels, which shows every rounding of a partial sum
    v[-1] = 1e-9
    expected = packed(q, k, v, [257])[-1]
    for seed in range(4):
        order = torch.cat([torch.randperm(256, generator=torch.Generator().manual_seed(seed)), torch.tensor([256])])
        assert torch.equal(packed(q, k[order], v[order], [257])[-1], expected)


def test_blocks_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [50, 50, 13]
    q, k, v = inputs(sum(lengths))
    expected = packed(q, k, v, lengths)
    for scores in (1, 1000, 12345):
        monkeypatch.setattr(attention, "_MAX_SCORES", scores)
        assert torch.equal(packed(q, k, v, lengths), expected)
    pool, table = fill_pool(k, v, lengths, 16)
    last = torch.tensor(lengths).cumsum(0) - 1
    for gathered in (1, 5000):
        monkeypatch.setattr(attention, "_MAX_GATHERED", gathered)
        decoded = paged_attention(
            q[last][:, None], pool, table, torch.tensor(lengths) - 1, scale=SCALE, max_context=MAX_CONTEXT
        )
        assert torch.equal(decoded[:, 0], expected[last])


def test_value_and_gradients_against_float64() -> None:
    lengths = [5, 31, 1, 31]
    q, k, v = (tensor.requires_grad_() for tensor in inputs(sum(lengths)))
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    out = packed(q, k, v, lengths)
    parts = []
    for own in torch.arange(sum(lengths)).split(lengths):
        heads = [tensor[own].transpose(0, 1) for tensor in wide]
        repeated = [tensor.repeat_interleave(HEADS // KV_HEADS, dim=0) for tensor in heads[1:]]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(heads[0], *repeated, is_causal=True, scale=SCALE).transpose(0, 1)
        )
    expected = torch.cat(parts)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for own_grad, tensor in zip((q, k, v), wide, strict=True):
        assert own_grad.grad is not None
        assert tensor.grad is not None
        torch.testing.assert_close(own_grad.grad.double(), tensor.grad, rtol=1e-3, atol=1e-3)


def test_no_tokens() -> None:
    q, k, v = inputs(0)
    assert packed(q, k, v, []).shape == (0, HEADS, HEAD_DIM)


def test_bad_arguments_are_named() -> None:
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match=r"keys must have shape \[6, any, 16\]"):
        packed(q, k[:5], v, [6])
    with pytest.raises(ValueError, match="multiple of the 3 key and value heads"):
        packed(q, k[:, :1].expand(-1, 3, -1), v[:, :1].expand(-1, 3, -1), [6])
    with pytest.raises(ValueError, match="a sequence of 6 tokens is beyond max_context=5"):
        packed_attention(q, k, v, pack_sequences([6]), scale=SCALE, max_context=5)
    with pytest.raises(ValueError, match="lengths must be at least 1"):
        pack_sequences([3, 0])
    with pytest.raises(ValueError, match="queries must be float32 or bfloat16"):
        packed(q.double(), k, v, [6])
