"""Kernels under an unmodified transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles_plan.kernels.cuda.enable import _sdpa, enable, enable_aten, visible_range
from miles_plan.kernels.cuda.log_prob import log_softmax
from miles_plan.kernels.cuda.matmul import matmul


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


def test_attention_is_called_with_tensors_of_the_querys_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the default device is another one than the model's, as on a GPU; "meta" lets a CPU tell the two apart.
    called: list[torch.Tensor] = []

    def stand_in(q: torch.Tensor, *tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        called.extend([*tensors, *(value for value in named.values() if isinstance(value, torch.Tensor))])
        return q

    monkeypatch.setattr("miles_plan.kernels.cuda.enable.attention", stand_in)
    q, k = torch.zeros(2, 4, 5, 16, device="meta"), torch.zeros(2, 2, 5, 16, device="meta")
    out = _sdpa(q, k, k, is_causal=True)
    assert out.shape == q.shape
    assert len(called) >= 5
    assert {x.device.type for x in called} == {"meta"}


SIZES = {
    "cpu": {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
    "cuda": {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3_moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}  # fmt: skip


def small(family: str, device: torch.device) -> torch.nn.Module:
    """An unmodified transformers model with random weights."""
    torch.manual_seed(0)
    config, model, more = FAMILIES[family]
    options = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa",
        "dtype": torch.bfloat16, **SIZES[device.type], **more,
    }  # fmt: skip
    found: torch.nn.Module = model(config(**options)).to(device, torch.bfloat16).eval()
    return found


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)


def decode_against_prefill(model: Any, ids: torch.Tensor, prompt: int) -> None:
    """Log-probabilities alone, in chunks, step by step and left-padded: the bits of one prefill of the batch."""
    with torch.no_grad(), enable(model):
        whole = log_probs(model(ids).logits)
        assert torch.equal(log_probs(model(ids[1:2]).logits), whole[1:2]), "a sequence alone"
        step = model(ids[:, :prompt], use_cache=True)
        assert torch.equal(log_probs(step.logits), whole[:, :prompt]), "a chunk"
        for at in range(prompt, ids.shape[1]):
            step = model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            assert torch.equal(log_probs(step.logits)[:, 0], whole[:, at]), at
        padded = torch.cat([torch.zeros_like(ids[:1, :8]), ids[:1]], 1)
        mask = torch.ones_like(padded)
        mask[:, :8] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = log_probs(model(padded, attention_mask=mask, position_ids=positions).logits)[:, 8:]
        assert torch.equal(left, whole[:1]), "left padding"


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_gives_prefills_log_probs(family: str) -> None:
    decode_against_prefill(small(family, torch.device("cpu")), torch.randint(0, 96, (2, 14)), 9)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_gives_prefills_log_probs_on_a_gpu(gpu: torch.device, family: str) -> None:
    decode_against_prefill(small(family, gpu), torch.randint(0, 512, (3, 40), device=gpu), 30)


def gradients_repeat(model: Any, ids: torch.Tensor, error: Callable[..., float], kinds: set[str]) -> None:
    """Gradients twice the same and near torch's; afterwards the model is itself again."""
    plain = model(ids).logits

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids).logits.float().flatten(0, 1), ids.flatten())
        loss.backward()  # type: ignore[no-untyped-call]  # torch's backward is untyped
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with enable(model):
        taken = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
        ours = model(ids).logits
        first, second = gradients(), gradients()
    assert taken == kinds
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    reference = gradients()
    assert max(error(a, b) for a, b in zip(first, reference, strict=True)) < 0.1
    assert error(ours, plain) < 0.03
    assert torch.equal(model(ids).logits, plain), "after the context the model is itself again"
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_repeat_and_the_model_is_as_before(error: Callable[..., float]) -> None:
    kinds = {"Qwen3MoeRMSNorm", "Qwen3MoeExperts"}
    gradients_repeat(small("qwen3_moe", torch.device("cpu")), torch.randint(0, 96, (2, 9)), error, kinds)


@pytest.mark.gpu
def test_gradients_repeat_on_a_gpu(gpu: torch.device, error: Callable[..., float]) -> None:
    gradients_repeat(small("qwen3", gpu), torch.randint(0, 512, (2, 33), device=gpu), error, {"Qwen3RMSNorm"})


def test_an_error_inside_restores_the_model_too() -> None:
    model, x = small("llama", torch.device("cpu")), torch.randn(4, 64).bfloat16()
    before = x @ x.T
    with pytest.raises(KeyError), enable(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(x @ x.T, before)


def test_what_is_not_covered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device_type is 'meta'; allowed: cuda, cpu"), enable_aten("meta"):
        raise AssertionError("not entered")
    model = small("llama", torch.device("cpu"))
    q = torch.randn(1, 4, 3, 16).bfloat16()
    with enable(model), pytest.raises(ValueError, match=r"dropout_p is 0\.5; allowed: 0\.0"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)


def test_torchs_own_operators_have_our_bits_and_gradients(error: Callable[..., float]) -> None:
    torch.manual_seed(0)
    model = small("llama", torch.device("cpu"))
    a, b = torch.randn(3, 5, 32).bfloat16().requires_grad_(), torch.randn(3, 32, 8).bfloat16().requires_grad_()
    with enable(model):
        product = torch.bmm(a, b)
        table = torch.log_softmax(product.float(), 1)
        table.sum().backward()  # type: ignore[no-untyped-call]  # torch's backward is untyped
    assert torch.equal(product[1], matmul(a[1], b[1].T.contiguous()))
    assert torch.equal(table[2].T, log_softmax(product[2].float().T.contiguous()))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    torch.log_softmax(torch.bmm(*wide), 1).sum().backward()  # type: ignore[no-untyped-call]
    for ours, exact in zip((a, b), wide, strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        assert error(ours.grad, exact.grad) < 2e-2
