"""Layer specs of Megatron-core's shape and SGLang's norm layers, by objects of the same form: neither is a dependency."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.hooks import CoreAttention, RmsNorm, megatron_layer_spec, sglang_model
from miles_plan.kernels.cuda.rms_norm import rms_norm


class TheirNorm:
    """Stands for the norm that a spec names."""


class IdentityOp:
    """Stands for Megatron's empty slot."""


@dataclass
class Spec:
    """megatron.core.transformer.spec_utils.ModuleSpec has these fields."""

    module: Any
    submodules: Any = None
    params: dict[str, Any] = field(default_factory=dict)


def test_norms_and_core_attention_are_replaced_and_nothing_else() -> None:
    inner = SimpleNamespace(linear_qkv="qkv", core_attention="theirs", q_layernorm=TheirNorm, k_layernorm=IdentityOp)
    spec = Spec("layer", SimpleNamespace(input_layernorm=TheirNorm, self_attention=Spec("attention", inner), mlp="mlp"))
    ours = megatron_layer_spec(spec)
    assert ours.submodules.input_layernorm is RmsNorm
    assert ours.submodules.mlp == "mlp"
    attention_slots = ours.submodules.self_attention.submodules
    assert attention_slots.core_attention is CoreAttention
    assert attention_slots.q_layernorm is RmsNorm
    assert attention_slots.k_layernorm is IdentityOp
    assert inner.core_attention == "theirs", "the spec that was passed in stays as it was"


def test_the_norm_and_attention_modules_compute_the_ops() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(params_dtype=torch.bfloat16, window_size=None)
    norm = RmsNorm(config, 32, eps=1e-5)
    x = torch.randn(4, 2, 32).bfloat16()
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-5))  # type: ignore[arg-type]  # one tensor without a residual
    core = CoreAttention(config, 1, None, "self", softmax_scale=0.25)
    q, k, v = (torch.randn(6, 2, heads, 16).bfloat16() for heads in (4, 2, 2))
    out = core(q, k, v, None)
    assert out.shape == (6, 2, 64)
    for i in range(2):
        alone = attention(q[:, i].contiguous(), k[:, i].contiguous(), v[:, i].contiguous(), scale=0.25)
        assert torch.equal(out[:, i], alone.reshape(6, 64))
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 2, 6]), max_seqlen_q=4)
    flat = [t[:, 0].contiguous() for t in (q, k, v)]
    out = core(*(t[:, None] for t in flat), None, packed)
    second = attention(*(t[2:].contiguous() for t in flat), scale=0.25)
    assert torch.equal(out[2:, 0], second.reshape(4, 64))


def test_sglangs_norm_layers_are_taken_over() -> None:
    class RMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16).bfloat16())
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("not taken over")

    model = torch.nn.Sequential(RMSNorm(), torch.nn.Linear(16, 16))
    assert sglang_model(model) == 1
    x, residual = torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    y, total = model[0](x, residual)
    want = rms_norm(x, model[0].weight.data, 1e-6, residual)  # type: ignore[arg-type]  # a parameter's data
    assert torch.equal(y, want[0])
    assert torch.equal(total, want[1])
