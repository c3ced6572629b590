"""Kernels under an unmodified transformers model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles_plan.kernels.cuda.enable import enable, visible_range


def mask_of(batch: int, q_len: int, kv_len: int, first: list[int], window: int | None = None) -> torch.Tensor:
    """The boolean mask transformers makes: causal, left-padded to `first`, perhaps windowed."""
    place = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None]
    seen = key <= place
    if window is not None:
        seen = seen & (key > place - window)
    return torch.stack([seen & (key >= f) for f in first])[:, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("q_len", [1, 4, 9])
def test_masks_that_mean_causal_attention_are_understood(q_len: int, window: int | None, additive: bool) -> None:
    mask = mask_of(2, q_len, 9, [0, 2], window)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    first, found, causal = visible_range(mask, 2, q_len, 9, False)
    assert causal
    if window is None:
        assert found is None
        assert first.tolist() == [0, 2]
    else:
        # What is invisible to every query may be padding or out of the window; either reading gives the same attention.
        low = torch.tensor([max(f, 0) for f in first.tolist()])
        seen = torch.arange(9)[None] >= torch.maximum(low, torch.tensor(9 - (found or 9)))[:, None]
        assert torch.equal(seen, (mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > -1))


def test_other_masks_are_refused() -> None:
    holes = mask_of(1, 4, 4, [0])
    holes[0, 0, 3, 1] = False
    with pytest.raises(ValueError, match="attn_mask is of no known form; allowed: causal"):
        visible_range(holes, 1, 4, 4, False)
    with pytest.raises(ValueError, match=r"attn_mask has shape \[4, 4\]; allowed: \[batch, 1, queries, keys\]"):
        visible_range(holes[0, 0], 1, 4, 4, False)
    with pytest.raises(ValueError, match="is_causal is set for 2 queries and 4 keys"):
        visible_range(None, 1, 2, 4, True)


def small(moe: bool, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "attn_implementation": "sdpa", "dtype": torch.bfloat16,
    }  # fmt: skip
    if moe:
        options |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options)).to(device, torch.bfloat16).eval()
    return Qwen3ForCausalLM(Qwen3Config(**options)).to(device, torch.bfloat16).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("moe", [False, True])
def test_decode_gives_prefills_bits(gpu: torch.device, moe: bool) -> None:
    model = small(moe, gpu)
    ids = torch.randint(0, 512, (3, 40), device=gpu)
    with torch.no_grad(), enable(model):
        whole = model(ids).logits
        assert torch.equal(model(ids[1:2]).logits, whole[1:2]), "a sequence alone"
        step = model(ids[:, :30], use_cache=True)
        assert torch.equal(step.logits, whole[:, :30])
        for at in range(30, 40):
            step = model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            assert torch.equal(step.logits[:, 0], whole[:, at]), at
        padded = torch.cat([torch.zeros(1, 8, dtype=ids.dtype, device=gpu), ids[:1]], 1)
        mask = torch.ones_like(padded)
        mask[:, :8] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 8:]
        assert torch.equal(left, whole[:1]), "left padding"


@pytest.mark.gpu
def test_gradients_repeat_and_the_model_is_as_before(gpu: torch.device, error: Callable[..., float]) -> None:
    model = small(False, gpu)
    ids = torch.randint(0, 512, (2, 33), device=gpu)
    plain = model(ids).logits

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids).logits.float().flatten(0, 1), ids.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with enable(model):
        ours = model(ids).logits
        first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    reference = gradients()
    assert max(error(a, b) for a, b in zip(first, reference, strict=True)) < 0.1
    assert error(ours, plain) < 0.03
    assert torch.equal(model(ids).logits, plain), "after the context the model is itself again"
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert norms
    assert not any("forward" in vars(module) for module in norms)
