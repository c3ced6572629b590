"""Megatron's rotary embedding on `rope`: packed sequences, parts of heads, angles and positions that are found once a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles_plan.kernels.cuda import megatron_rotary
from miles_plan.kernels.cuda.megatron_rotary import Rotary
from miles_plan.kernels.cuda.rope import rope
from miles_plan.kernels.cuda.rope_table import rotation_tables

CONFIG = SimpleNamespace(rotary_interleaved=False)
SIZE, LONGEST = 16, 20


def frequencies(base: float = 100.0) -> torch.Tensor:
    """Megatron's: [positions, 1, 1, size], both halves alike."""
    half = torch.arange(LONGEST)[:, None] / base ** (torch.arange(SIZE // 2) / (SIZE // 2))
    return torch.cat((half, half), -1)[:, None, None]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed anew."""
    calls: list[str] = []
    for name in ("rotation_tables", "_positions"):
        theirs: Any = getattr(megatron_rotary, name)
        monkeypatch.setattr(
            megatron_rotary, name, lambda *given, name=name, theirs=theirs: calls.append(name) or theirs(*given)
        )
    return calls


def want(t: torch.Tensor, freqs: torch.Tensor, positions: list[int]) -> torch.Tensor:
    tables = rotation_tables(freqs[:, 0, 0, : SIZE // 2].contiguous())
    return rope(t, t[:, :0], *tables, torch.tensor(positions))[0]


def test_a_pass_finds_angles_and_positions_once(found: list[str]) -> None:
    torch.manual_seed(0)
    rotary, freqs, starts = Rotary(), frequencies(), ints(0, 5, 9)
    positions = [0, 1, 2, 3, 4, 0, 1, 2, 3]
    for heads in (4, 2, 4, 2):
        t = torch.randn(9, heads, SIZE).bfloat16()
        assert torch.equal(rotary(t, freqs, CONFIG, starts), want(t, freqs, positions))
    assert sorted(found) == ["_positions", "rotation_tables"]


def test_other_sequences_and_angles_are_never_taken_for_these(found: list[str]) -> None:
    torch.manual_seed(0)
    rotary, freqs, t = Rotary(), frequencies(), torch.randn(9, 2, SIZE).bfloat16()
    starts = ints(0, 5, 9)
    rotary(t, freqs, CONFIG, starts)
    for given, positions in ((ints(0, 3, 9), [0, 1, 2, 0, 1, 2, 3, 4, 5]), (ints(0, 9), list(range(9)))):
        assert torch.equal(rotary(t, freqs, CONFIG, given), want(t, freqs, positions))
    starts[1] = 2  # the same tensor, written to
    rotary(t, freqs, CONFIG, starts)
    starts[1] = 6
    assert torch.equal(rotary(t, freqs, CONFIG, starts), want(t, freqs, [0, 1, 2, 3, 4, 5, 0, 1, 2]))
    other = frequencies(50.0)
    assert torch.equal(rotary(t, other, CONFIG, starts), want(t, other, [0, 1, 2, 3, 4, 5, 0, 1, 2]))
    assert found.count("rotation_tables") == 2


def test_batches_and_parts_of_heads_and_their_gradients() -> None:
    torch.manual_seed(0)
    freqs = frequencies()
    t = torch.randn(6, 3, 2, SIZE + 8).bfloat16().requires_grad_()
    turned = Rotary()(t, freqs, CONFIG)
    flat = t.detach().reshape(-1, 2, SIZE + 8)
    positions = [token for token in range(6) for _ in range(3)]
    assert torch.equal(turned[..., :SIZE].reshape(-1, 2, SIZE), want(flat[..., :SIZE].contiguous(), freqs, positions))
    assert torch.equal(turned[..., SIZE:], t[..., SIZE:])
    grad = torch.randn_like(turned)
    turned.backward(grad)
    whole = t.detach()[..., :SIZE].contiguous().requires_grad_()
    Rotary()(whole, freqs, CONFIG).backward(grad[..., :SIZE].contiguous())
    assert t.grad is not None
    assert whole.grad is not None
    assert torch.equal(t.grad[..., :SIZE], whole.grad), "a whole head takes no slice, and has the same gradient"
    assert torch.equal(t.grad[..., SIZE:], grad[..., SIZE:])


def test_what_it_does_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rotary_interleaved or context parallelism is on"):
        Rotary()(torch.zeros(2, 1, SIZE), frequencies(), SimpleNamespace(rotary_interleaved=True))
