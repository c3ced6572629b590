"""Megatron-core's own model on the kernels: skipped where megatron-core is not installed, as on most machines without a GPU."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_plan.kernels.cuda import hooks_megatron
from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.log_prob import log_prob
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rms_norm_module import RmsNorm
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.swiglu import swiglu

LAYERS, WIDTH, VOCABULARY, EXPERTS, TOKENS = 2, 128, 512, 4, 12


@pytest.fixture
def megatron() -> None:
    """Skips the test where Megatron-core's layers do not import."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    pytest.importorskip("triton", reason="megatron-core imports triton, which is not installed")


def test_without_megatron_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith("megatron.")]:  # an earlier test may have loaded it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.delitem(sys.modules, "miles_plan.kernels.cuda.megatron_layers", raising=False)
    monkeypatch.delattr("miles_plan.kernels.cuda.megatron_layers", raising=False)
    with pytest.raises(hooks_megatron.MegatronMissing, match=r"^megatron-core 0\.19 is needed"), hooks_megatron.enable():
        raise AssertionError("not entered")


def test_the_norm_module_is_torchs_with_other_arithmetic() -> None:
    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    norm = RmsNorm(config, 32, eps=1e-5)
    x = torch.randn(4, 2, 32).bfloat16()
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-5))  # type: ignore[arg-type]  # one tensor without a residual
    assert set(norm.state_dict()) == {"weight"}
    assert norm.weight.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark
    with pytest.raises(ValueError, match=r"^config\.layernorm_zero_centered_gamma is set"):
        RmsNorm(SimpleNamespace(params_dtype=torch.bfloat16, layernorm_zero_centered_gamma=True), 32)


@dataclass(frozen=True)
class Layout:
    """A way of splitting the model."""

    tp: int = 1
    ep: int = 1
    sequence: bool = False
    experts: bool = False

    @property
    def ranks(self) -> int:
        return max(self.tp, self.ep)


@contextlib.contextmanager
def on_cpus() -> Iterator[None]:
    """Megatron-core asks for a CUDA device, streams and random states even where weights are made on the CPU."""
    from megatron.core.tensor_parallel import random

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext())
        yield


def config_of(layout: Layout) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = {}
    if layout.experts:
        experts = {
            "num_moe_experts": EXPERTS, "moe_router_topk": 2, "moe_ffn_hidden_size": 128, "moe_aux_loss_coeff": 0.01,
            "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "aux_loss",
            "expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": 1,
        }  # fmt: skip
    return TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2, kv_channels=32,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm", add_bias_linear=False,
        use_cpu_initialization=True, attention_dropout=0.0, hidden_dropout=0.0, qk_layernorm=True, bf16=True,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, **experts,
    )  # fmt: skip


def model_of(layout: Layout, rank: int) -> Any:
    """A GPTModel on the kernels, with the weights that any layout has."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    theirs = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=True, num_experts=EXPERTS if layout.experts else None
    )
    spec = TransformerBlockSubmodules(layer_specs=[hooks_megatron.layer_spec(theirs)] * LAYERS, layer_norm=RmsNorm)
    model = GPTModel(
        config_of(layout), spec, vocab_size=VOCABULARY, max_sequence_length=64, parallel_output=True,
        position_embedding_type="rope", rotary_base=10_000, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    assert hooks_megatron.take_over(model) >= 2, "the word embedding and the output layer"
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weight_of(name, parameter, layout, rank))
    return model


def weight_of(name: str, parameter: torch.nn.Parameter, layout: Layout, rank: int) -> torch.Tensor:
    """This rank's part of a weight drawn by the name it would have on one rank."""
    shape, split = list(parameter.shape), 1
    if "local_experts." in name:
        local = int(name.split("local_experts.")[1].split(".")[0])
        name = name.replace(f"local_experts.{local}.", f"local_experts.{rank % layout.ep * (EXPERTS // layout.ep) + local}.")
    elif getattr(parameter, "tensor_model_parallel", False):
        split = layout.tp
        shape[parameter.partition_dim] *= split  # type: ignore[attr-defined]  # Megatron's mark
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator) * 0.05 + float(len(shape) == 1)
    if split == 1:
        return whole
    if "linear_fc1" in name:  # gate and up are split one by one
        return torch.cat([half.chunk(split)[rank % split] for half in whole.chunk(2)])
    return whole.chunk(split, parameter.partition_dim)[rank % split]  # type: ignore[attr-defined]


def rank_main(rank: int, layout: Layout, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=layout.ranks, rank=rank)
    from megatron.core import parallel_state

    with on_cpus():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1
        )
        model = model_of(layout, rank)
        ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
        mine = ids[rank : rank + 1] if layout.ep > 1 else ids
        places = torch.arange(TOKENS).expand(mine.shape)
        with hooks_megatron.enable():
            logits = model(mine, places, None)
            targets = torch.roll(mine, -1, 1).flatten()
            columns = logits.shape[-1]
            found = log_prob(
                logits.reshape(-1, columns), targets, vocab_start=rank % layout.tp * columns, vocab_size=VOCABULARY,
                group=parallel_state.get_tensor_model_parallel_group(),
            )  # fmt: skip
            found.sum().backward()  # type: ignore[no-untyped-call]  # torch's backward is untyped
            if layout == Layout():
                others_of_one_rank(model, mine, places, logits)
        if layout.ranks == 1:
            with torch.no_grad():
                assert torch.equal(sglang_log_probs(model, ids[0]), found.view(2, -1)[0]), "SGLang's steps give Megatron's bits"
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save((found.detach(), gradients), f"{out}.{rank}")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def others_of_one_rank(model: Any, ids: torch.Tensor, places: torch.Tensor, logits: torch.Tensor) -> None:
    """A prefix alone, and both sequences packed, give the bits of the batch."""
    from megatron.core.packed_seq_params import PackedSeqParams

    assert torch.equal(model(ids[:1, :7], places[:1, :7], None), logits[:1, :7])
    starts = torch.tensor([0, TOKENS, 2 * TOKENS], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=TOKENS, max_seqlen_kv=TOKENS
    )
    flat = model(ids.reshape(1, -1), places.reshape(1, -1), None, packed_seq_params=packed)
    assert torch.equal(flat.view(logits.shape), logits)


Run = Callable[[Layout], list[tuple[torch.Tensor, dict[str, torch.Tensor]]]]


@pytest.fixture
def run(megatron: None, tmp_path: Path) -> Run:
    """run(layout): each rank's log-probabilities and gradients."""

    def spawn(layout: Layout) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        out = str(tmp_path / f"{abs(hash(layout))}")
        mp.spawn(rank_main, (layout, port, out), layout.ranks)  # type: ignore[no-untyped-call]  # torch's spawn is untyped
        return [torch.load(f"{out}.{rank}") for rank in range(layout.ranks)]

    return spawn


@pytest.mark.slow
def test_tensor_parallel_ranks_give_the_bits_of_one(run: Run) -> None:
    ((whole, gradients),) = run(Layout())
    for sequence in (False, True):
        for rank, (found, part) in enumerate(run(Layout(tp=2, sequence=sequence))):
            assert torch.equal(found, whole), sequence
            for name, want in gradients.items():
                if "layernorm" in name:  # a rank has the share of its heads or tokens; Megatron adds them up afterwards
                    continue
                dimension = 1 if "linear_proj" in name or "linear_fc2" in name else 0
                split = [half.chunk(2, dimension)[rank] for half in (want.chunk(2) if "linear_fc1" in name else (want,))]
                assert torch.equal(part[name], torch.cat(split)), (name, sequence)


def sglang_log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of one sequence by the steps that SGLang's Qwen3 takes, on its hooks, with a GPTModel's weights."""
    from miles_plan.kernels.cuda import hooks_sglang

    def norm(theirs: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        module = SimpleNamespace(weight=theirs.weight, variance_epsilon=theirs.eps)
        return hooks_sglang._norm(module, x, residual)

    cache = torch.zeros(64, 32)
    rotary = hooks_sglang._Rotary(
        "rotary",
        SimpleNamespace(is_neox_style=True, head_size=32, rotary_dim=32, base=10_000, cos_sin_cache=cache),
        {},
        plain=True,
    )
    x, residual, places = model.embedding.word_embeddings.weight[ids], None, torch.arange(ids.numel())
    for layer in model.decoder.layers:
        if residual is None:
            x, residual = norm(layer.input_layernorm, x), x
        else:
            x, residual = norm(layer.input_layernorm, x, residual)
        mine = layer.self_attention
        # Megatron stores a group's two queries, key and value together; SGLang all queries, keys, values
        fused = mine.linear_qkv.weight.view(2, 4, 32, WIDTH)
        weight = torch.cat([fused[:, :2].reshape(-1, WIDTH), fused[:, 2].reshape(-1, WIDTH), fused[:, 3].reshape(-1, WIDTH)])
        q, k, v = hooks_sglang._column_linear(SimpleNamespace(weight=weight), x).split([128, 64, 64], -1)
        q, k = norm(mine.q_layernorm, q.reshape(-1, 32)).view_as(q), norm(mine.k_layernorm, k.reshape(-1, 32)).view_as(k)
        q, k = rotary(places, q, k)
        out = attention(q.view(-1, 4, 32), k.view(-1, 2, 32), v.reshape(-1, 2, 32)).flatten(1)
        x = hooks_sglang._row_linear(mine.linear_proj, out, ranks=1)
        x, residual = norm(layer.pre_mlp_layernorm, x, residual)
        if hasattr(layer.mlp, "experts"):
            x = sglang_experts(layer.mlp, x)
        else:
            hidden = swiglu(hooks_sglang._column_linear(layer.mlp.linear_fc1, x))
            x = hooks_sglang._row_linear(layer.mlp.linear_fc2, hidden, ranks=1)
    x, _ = norm(model.decoder.final_layernorm, x, residual)
    return log_prob(matmul(x, model.output_layer.weight), torch.roll(ids, -1))


def sglang_experts(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    """The gate, the choice and the experts of SGLang's Qwen3-MoE."""
    from miles_plan.kernels.cuda import hooks_sglang

    weights, ids = router(hooks_sglang._gate(theirs.router, x), 2)
    names = ("linear_fc1", "linear_fc2")
    up, down = (torch.stack([getattr(expert, name).weight for expert in theirs.experts.local_experts]) for name in names)
    layer = SimpleNamespace(w13_weight=up, w2_weight=down, num_local_experts=EXPERTS, moe_ep_size=1, moe_ep_rank=0)
    given = SimpleNamespace(hidden_states=x, topk_output=SimpleNamespace(topk_weights=weights, topk_ids=ids))
    found: torch.Tensor = hooks_sglang._experts(layer, given, combine_input=lambda hidden_states: hidden_states)
    return found


@pytest.mark.slow
def test_expert_parallel_ranks_give_the_bits_of_one(run: Run) -> None:
    ((whole, _),) = run(Layout(experts=True))
    parts = run(Layout(ep=2, experts=True))
    assert torch.equal(torch.cat([found for found, _ in parts]), whole)


def test_a_slot_that_is_not_covered_is_named(megatron: None) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.linear_qkv = torch.nn.Linear
    with pytest.raises(ValueError, match=r"^spec\.submodules\.self_attention\.submodules\.linear_qkv is Linear; allowed: "):
        hooks_megatron.layer_spec(spec)
    spec.submodules.mlp = partial(os.getcwd)
    with pytest.raises(ValueError, match=r"^spec\.submodules\.self_attention"):
        hooks_megatron.layer_spec(spec)


def test_the_spec_that_was_passed_in_stays_as_it_was(megatron: None) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=4)
    before = repr(spec)
    ours = hooks_megatron.layer_spec(spec)
    assert repr(spec) == before
    assert ours.submodules.input_layernorm is RmsNorm
    assert ours.submodules.mlp.func.__module__ == "miles_plan.kernels.cuda.megatron_layers"
    assert repr(hooks_megatron.layer_spec(ours)) == repr(ours)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout", 0.1),
        ("add_bias_linear", True),
        ("context_parallel_size", 2),
        ("normalization", "LayerNorm"),
        ("qk_clip", True),
    ],
)
def test_a_config_that_is_not_covered_is_named(megatron: None, field: str, value: object) -> None:
    from miles_plan.kernels.cuda.megatron_layers import check_config

    config = config_of(Layout())
    check_config(config)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"^config\.{field} is {value!r}; allowed with these kernels: "):
        check_config(config)
