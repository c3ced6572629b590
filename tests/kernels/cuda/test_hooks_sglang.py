"""SGLang's layers on the kernels, by objects with the attributes that the hooks read: sglang 0.5.16 itself needs a GPU."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from miles_plan.backends.training.decoder_config import decoder_config
from miles_plan.kernels.cuda import hooks_sglang
from miles_plan.kernels.cuda.enable import enable_aten
from miles_plan.kernels.cuda.hooks_sglang import (
    SUM_TO,
    LayerTypes,
    install,
    plugin,
    register,
    tree_first,
)
from miles_plan.kernels.cuda.matmul import matmul, tree_partial
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import rope
from miles_plan.kernels.cuda.rope_table import angles_of, inverse_frequencies, rotation_tables
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.swiglu import swiglu
from miles_plan.kernels.cuda.tensor_core import add_tree


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape).bfloat16(), requires_grad=False)


class Op(torch.nn.Module):
    """SGLang's MultiPlatformOp: forward is whatever `_forward_method` is."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self._forward_method(*args, **keywords)

    def _forward_method(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not taken over")


class PlainMethod:
    """UnquantizedLinearMethod and UnquantizedFusedMoEMethod."""

    def apply(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not taken over")


class OtherMethod(PlainMethod):
    """A quantised layer's."""


class Linear(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, method: PlainMethod | None = None) -> None:
        super().__init__()
        self.weight = parameter(outputs, inputs)
        self.quant_method: Any = method or PlainMethod()
        self.bias: torch.Tensor | None = None
        self.tp_size = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.quant_method.apply(self, x, bias=None)
        return out


class RowLinear(Linear):
    pass


class RMSNorm(Op):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width).bfloat16())
        self.variance_epsilon, self.has_weight = 1e-6, True
        self.variance_size_override, self.fp32_residual, self.override_orig_dtype = None, False, None


class SiluAndMul(Op):
    pass


class RotaryEmbedding(Op):
    def __init__(self, head_size: int = 16, rotary: int = 16) -> None:
        super().__init__()
        self.head_size, self.rotary_dim, self.base, self.is_neox_style = head_size, rotary, 10_000, True
        self.register_buffer("cos_sin_cache", torch.randn(40, rotary))


class ScaledRotary(RotaryEmbedding):
    """A subclass with tables of its own, such as YaRN's."""


class TopK(Op):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        values: dict[str, Any] = {
            "num_fused_shared_experts": 0, "custom_routing_function": None, "routed_scaling_factor": None, "renormalize": True,
            "scoring_func": "softmax", "correction_bias": None, "use_grouped_topk": False, "num_expert_group": None,
            "topk_group": None,
        }  # fmt: skip
        self.topk_config = SimpleNamespace(**(values | changes))


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    topk_output: Any


class FusedMoE(torch.nn.Module):
    def __init__(self, experts: int, width: int, inner: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.w13_weight, self.w2_weight = (
            parameter(experts // ranks, 2 * inner, width),
            parameter(experts // ranks, width, inner),
        )
        self.num_local_experts, self.moe_ep_size, self.moe_ep_rank, self.moe_tp_size = experts // ranks, ranks, rank, 1
        self.quant_method: Any = PlainMethod()

    def forward(self, x: torch.Tensor, chosen: Any) -> torch.Tensor:
        out: torch.Tensor = self.quant_method.apply(self, Dispatched(x, chosen)).hidden_states
        return out


TYPES = LayerTypes(
    Linear, RowLinear, RMSNorm, SiluAndMul, RotaryEmbedding, FusedMoE, TopK, PlainMethod, PlainMethod,
    lambda hidden_states: SimpleNamespace(hidden_states=hidden_states),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed a test, and aten's products left alone: a model that lives on would slow other tests' products down."""
    torch.manual_seed(0)
    monkeypatch.setattr(hooks_sglang, "enable_aten", lambda _: contextlib.nullcontext())


def model(**modules: torch.nn.Module) -> torch.nn.ModuleDict:
    """Modules by name, taken over; a parameter at least, as any model has."""
    found = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), **modules})
    install(found, TYPES)
    return found


def test_every_kind_of_layer_is_taken_over_and_counted() -> None:
    found = torch.nn.ModuleDict(
        {
            "qkv_proj": Linear(32, 48), "o_proj": RowLinear(128, 32), "norm": RMSNorm(32), "act": SiluAndMul(),
            "rotary": RotaryEmbedding(), "topk": TopK(), "experts": FusedMoE(4, 32, 16), "gate": Linear(32, 4),
        }
    )  # fmt: skip
    assert install(found, TYPES) == {
        "linear": 3, "norm": 1, "activation": 1, "rotary": 1, "choice": 1, "experts": 1,
    }  # fmt: skip
    x, wide = torch.randn(5, 32).bfloat16(), torch.randn(5, 128).bfloat16()
    assert torch.equal(found["qkv_proj"](x), matmul(x, found["qkv_proj"].weight))  # type: ignore[arg-type]  # a parameter
    assert torch.equal(found["o_proj"](wide), matmul(wide, found["o_proj"].weight, order="tree"))  # type: ignore[arg-type]
    logits = found["gate"](x)
    assert logits.dtype == torch.float32, "the router takes its logits unrounded"
    assert torch.equal(found["act"](wide), swiglu(wide))


def test_norms_with_and_without_residual() -> None:
    norm = model(norm=RMSNorm(16))["norm"]
    x, residual, more = (torch.randn(3, 16).bfloat16() for _ in range(3))
    weight: Any = norm.weight.data
    assert torch.equal(norm(x), rms_norm(x, weight, 1e-6))  # type: ignore[arg-type]  # one tensor without a residual
    y, total = norm(x, residual)
    want = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(y, want[0])
    assert torch.equal(total, want[1])
    assert torch.equal(norm(x, residual, more)[1], x + (residual + more))


@pytest.mark.parametrize("ranks", [2, 4])
def test_row_parallel_partials_are_added_as_a_tree(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parameter(24, 256)
    x = torch.randn(3, 256).bfloat16()
    parts = []
    for rank in range(ranks):
        layer = RowLinear(256 // ranks, 24)
        columns = slice(rank * 256 // ranks, (rank + 1) * 256 // ranks)
        layer.weight, layer.tp_size = torch.nn.Parameter(whole[:, columns].contiguous(), requires_grad=False), ranks
        parts.append(model(o_proj=layer)["o_proj"](x[:, columns].contiguous()))
    assert all(getattr(part, SUM_TO) == torch.bfloat16 for part in parts)
    assert torch.equal(add_tree(parts).bfloat16(), matmul(x, whole, order="tree"))
    seen = []
    monkeypatch.setattr(hooks_sglang, "tree_all_reduce", lambda *given: seen.append(given))
    reduce = tree_first(lambda group, x: x + 1)
    reduce(SimpleNamespace(device_group="tp"), parts[0])
    assert seen == [(parts[0], torch.bfloat16, "tp")]
    assert reduce(SimpleNamespace(device_group="tp"), torch.ones(2)).tolist() == [2.0, 2.0], "other sums stay SGLang's"


def test_rotary_embeddings_have_megatrons_tables_or_their_own() -> None:
    x = torch.randn(5, 3 * 16).bfloat16()
    key = torch.randn(5, 16).bfloat16()
    at = torch.tensor([3, 0, 39, 7, 7])
    plain = model(rotary=RotaryEmbedding())["rotary"]
    tables = rotation_tables(angles_of(inverse_frequencies(10_000, 16), 40))
    want = rope(x.view(5, 3, 16), key.view(5, 1, 16), *tables, at)
    q, k = plain(at, x, key)
    assert torch.equal(q, want[0].view(5, 48))
    assert torch.equal(k, want[1].view(5, 16))
    scaled = ScaledRotary()
    cache: Any = scaled.cos_sin_cache
    q, _ = model(rotary=scaled)["rotary"](at, x, key)
    cos, sin = (half.contiguous() for half in cache.chunk(2, -1))
    assert torch.equal(q, rope(x.view(5, 3, 16), key.view(5, 1, 16), cos, sin, at)[0].view(5, 48))


def test_scaled_rotary_embeddings_take_the_trainers_frequencies() -> None:
    rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, rope_parameters=rope_parameters
    )
    inverse = torch.tensor(decoder_config(config).inverse_frequencies, dtype=torch.float32)
    holder = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "rotary": ScaledRotary()})
    install(holder, TYPES, config.rope_parameters)
    x, key, at = torch.randn(5, 3 * 16).bfloat16(), torch.randn(5, 16).bfloat16(), torch.tensor([3, 0, 39, 7, 7])
    q, _ = holder["rotary"](at, x, key)
    want = rope(x.view(5, 3, 16), key.view(5, 1, 16), *rotation_tables(angles_of(inverse, 40)), at)[0]
    assert torch.equal(q, want.view(5, 48))


def test_part_of_a_head_is_rotated_and_the_cache_written() -> None:
    rotary = model(rotary=RotaryEmbedding(16, 8))["rotary"]
    x, key, value = torch.randn(2, 32).bfloat16(), torch.randn(2, 16).bfloat16(), torch.randn(2, 16).bfloat16()
    into = SimpleNamespace(
        k_buffer=torch.zeros(9, 16).bfloat16(),
        v_buffer=torch.zeros(9, 16).bfloat16(),
        cache_loc=torch.tensor([4, 7]),
        value=value,
    )
    q, k = rotary(torch.tensor([5, 6]), x, key, fused_set_kv_buffer_arg=into)
    assert torch.equal(q.view(2, 2, 16)[..., 8:], x.view(2, 2, 16)[..., 8:])
    assert not torch.equal(q.view(2, 2, 16)[..., :8], x.view(2, 2, 16)[..., :8])
    assert torch.equal(into.k_buffer[[4, 7]], k)
    assert torch.equal(into.v_buffer[[4, 7]], value)


def routed(tokens: int, experts: int, top_k: int = 2) -> SimpleNamespace:
    topk = model(topk=TopK())["topk"]
    config: Any = topk.topk_config
    logits = torch.randn(tokens, experts)
    weights, ids = config.custom_routing_function(hidden_states=None, gating_output=logits, topk=top_k, renormalize=True)
    want = router(logits, top_k)
    assert torch.equal(weights, want[0])
    assert torch.equal(ids, want[1])
    return SimpleNamespace(topk_weights=weights, topk_ids=ids)


def test_experts_are_added_in_ascending_order_alone_and_in_a_batch() -> None:
    experts = model(experts=FusedMoE(8, 32, 16)).float()["experts"]  # float32, where any other order shows
    chosen = routed(7, 8, 4)
    x = torch.randn(7, 32)
    whole = experts(x, chosen)
    up: Any = experts.w13_weight
    down: Any = experts.w2_weight
    for token in range(7):
        total = torch.zeros(32)
        for expert in sorted(chosen.topk_ids[token].tolist()):
            row = matmul(swiglu(matmul(x[token : token + 1], up[expert])), down[expert])
            weight = chosen.topk_weights[token][chosen.topk_ids[token] == expert]
            total = (row[0].double() * weight.double() + total.double()).float()
        assert torch.equal(whole[token], total)
    alone = SimpleNamespace(topk_weights=chosen.topk_weights[3:4].flip(1), topk_ids=chosen.topk_ids[3:4].flip(1))
    assert torch.equal(experts(x[3:4], alone), whole[3:4]), "the order in which experts are listed does not show"


def expert_parallel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two simulated ranks against one."""
    one = model(experts=FusedMoE(4, 32, 16)).to(device)["experts"]
    chosen, x = routed(6, 4), torch.randn(6, 32).bfloat16().to(device)
    chosen.topk_weights, chosen.topk_ids = chosen.topk_weights.to(device), chosen.topk_ids.to(device)
    want = one(x, chosen)
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(hooks_sglang, "_expert_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda rows, group: sent.append(rows.clone()))
    ranks = []
    for rank in range(2):
        mine = FusedMoE(4, 32, 16, rank, 2)
        mine.w13_weight.data.copy_(one.w13_weight[2 * rank : 2 * rank + 2])  # type: ignore[index]  # a parameter
        mine.w2_weight.data.copy_(one.w2_weight[2 * rank : 2 * rank + 2])  # type: ignore[index]
        ranks.append(model(experts=mine).to(device)["experts"])
        ranks[rank](x, chosen)
    assert not ((sent[0] != 0) & (sent[1] != 0)).any(), "a row is one rank's"
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda rows, group: rows.copy_(sent[0] + sent[1]))
    assert torch.equal(ranks[0](x, chosen), want)
    assert not ranks[1](x, chosen).any(), "SGLang adds the ranks' results once more"


def test_expert_parallel_ranks_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expert_parallel(torch.device("cpu"), monkeypatch)


@pytest.mark.gpu
def test_expert_parallel_ranks_add_up_to_one_on_a_gpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    expert_parallel(gpu, monkeypatch)


@pytest.mark.gpu
def test_experts_can_be_captured(gpu: torch.device) -> None:
    """Nothing waits for the device, so SGLang's decode graphs can hold the layer."""
    experts = model(experts=FusedMoE(4, 64, 32)).to(gpu)["experts"]
    chosen, x = routed(6, 4), torch.randn(6, 64).bfloat16().to(gpu)
    chosen.topk_weights, chosen.topk_ids = chosen.topk_weights.to(gpu), chosen.topk_ids.to(gpu)
    want = experts(x, chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, chosen)
    x.copy_(torch.randn(6, 64))
    graph.replay()
    assert torch.equal(out, experts(x, chosen))
    assert not torch.equal(out, want)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Linear(8, 8, OtherMethod()), "layer has the quantisation OtherMethod; allowed: none"),
        (TopK(num_fused_shared_experts=1), "layer fuses shared experts, scales or routes in its own way"),
        (TopK(routed_scaling_factor=2.5), "layer fuses shared experts, scales or routes in its own way"),
    ],
)
def test_layers_that_are_not_covered_are_named(module: torch.nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model(layer=module)


def test_a_bias_and_interleaved_halves_are_named() -> None:
    biased, interleaved, odd, split = Linear(8, 8), RotaryEmbedding(), RMSNorm(8), FusedMoE(4, 8, 8)
    biased.bias, interleaved.is_neox_style, odd.fp32_residual, split.moe_tp_size = torch.zeros(8), False, True, 2
    for module, message in (
        (biased, "layer has a bias"), (interleaved, "layer interleaves its halves"), (odd, "layer has variance_size_override"),
        (split, "layer splits each expert over 2 ranks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            model(layer=module)


def test_bare_products_are_ours_while_the_model_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_sglang, "enable_aten", enable_aten)
    x, weight = torch.randn(4, 48).bfloat16(), torch.randn(16, 48).bfloat16()
    before = torch.matmul(x, weight.T)
    found = model()
    assert torch.equal(torch.matmul(x, weight.T), matmul(x, weight))
    found.__dict__["batch_invariant_products"].close()
    assert torch.equal(torch.matmul(x, weight.T), before)


def test_without_sglang_the_errors_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(hooks_sglang.SglangMissing, match=r"^sglang 0\.5\.16 is needed for its layers"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(hooks_sglang.SglangMissing, match=r"^sglang 0\.5\.16 is needed for its backends"):
        register()
    plugin()  # without the switch it does nothing, whatever is installed
    monkeypatch.setenv(hooks_sglang.SWITCH, "1")
    with pytest.raises(hooks_sglang.SglangMissing):
        plugin()


def test_partials_of_row_linear_are_the_trees() -> None:
    layer = RowLinear(64, 8)
    layer.tp_size = 2
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(model(o_proj=layer)["o_proj"](x), tree_partial(x, layer.weight, 2))
