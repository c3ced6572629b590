"""Elements of Hugging Face tensors in parameters that are fused and split as SGLang's layers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from miles_plan.backends.sglang_engine.placed_weights import can_probe, probes_of, unlike

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 8, 4, 2, 2, 6, 10
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.norm.weight": (HIDDEN,),
}


class Placed(nn.Module):
    """A parameter with what SGLang's layer of that kind says about it."""

    def __init__(self, weight: torch.Tensor, **says: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        for name, value in says.items():
            setattr(self, name, value)


class Shards:
    """VocabParallelEmbedding.shard_indices, as far as it is read."""

    def __init__(self, start: int, stop: int) -> None:
        self.org_vocab_start_index, self.org_vocab_end_index = start, stop


def rows(tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    size = tensor.shape[0] // tp
    return tensor[rank * size : (rank + 1) * size]


def columns(tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    return rows(tensor.T, rank, tp).T


def sglang_like(full: dict[str, torch.Tensor], rank: int, tp: int) -> nn.Module:
    """The rank's model: what SGLang's Qwen3 holds after load_weights."""
    layer = "model.layers.0."
    kv_ranks, replicas = min(tp, KV_HEADS), max(1, tp // KV_HEADS)
    qkv = [rows(full[f"{layer}self_attn.q_proj.weight"], rank, tp)]
    qkv += [rows(full[f"{layer}self_attn.{name}_proj.weight"], rank // replicas, kv_ranks) for name in "kv"]
    gate_up = [rows(full[f"{layer}mlp.{name}_proj.weight"], rank, tp) for name in ("gate", "up")]
    size = VOCAB // tp
    embedding = rows(full["model.embed_tokens.weight"], rank, tp)
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = Placed(
        torch.cat([embedding, torch.zeros(3, HIDDEN)]), shard_indices=Shards(rank * size, (rank + 1) * size), tp_rank=rank
    )
    attention, mlp, block = nn.Module(), nn.Module(), nn.Module()
    attention.qkv_proj = Placed(
        torch.cat(qkv),
        head_size=HEAD,
        num_heads=HEADS // tp,
        num_kv_heads=KV_HEADS // kv_ranks,
        num_kv_head_replicas=replicas,
        tp_rank=rank,
        tp_size=tp,
    )
    attention.o_proj = Placed(columns(full[f"{layer}self_attn.o_proj.weight"], rank, tp), tp_rank=rank)
    mlp.gate_up_proj = Placed(torch.cat(gate_up), tp_rank=rank, tp_size=tp)
    mlp.down_proj = Placed(columns(full[f"{layer}mlp.down_proj.weight"], rank, tp), tp_rank=rank)
    block.self_attn, block.mlp = attention, mlp
    model.model.layers = nn.ModuleList([block])
    model.model.norm = Placed(full["model.norm.weight"])
    return model


@pytest.fixture
def full() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def every_element(full: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(tensor.shape), "row": at // width, "column": at % width, "value": value}
        for name, tensor in full.items()
        for width in [tensor.shape[1] if tensor.dim() > 1 else 1]
        for at, value in enumerate(tensor.reshape(-1).tolist())
    ]


@pytest.mark.parametrize("tp", [1, 2])
def test_every_element_is_found_where_sglang_puts_it(full: dict[str, torch.Tensor], tp: int) -> None:
    for rank in range(tp):
        assert list(unlike(sglang_like(full, rank, tp), every_element(full))) == []


@pytest.mark.parametrize("tp", [1, 2])
def test_every_element_is_held_by_some_rank(full: dict[str, torch.Tensor], tp: int) -> None:
    """Probes with a wrong value are noticed by at least one rank, whatever the tensor."""
    probes = [{**probe, "value": probe["value"] + 1.0} for probe in every_element(full)]
    found = [text for rank in range(tp) for text in unlike(sglang_like(full, rank, tp), probes)]
    assert len({text.partition(" is ")[0] for text in found}) == len(probes)


def test_key_heads_that_ranks_share_are_found_on_each(full: dict[str, torch.Tensor]) -> None:
    for rank in range(4):
        assert list(unlike(sglang_like(full, rank, 4), every_element({n: full[n] for n in SHAPES if "_attn" in n}))) == []


def test_probes_are_elements_of_the_tensor(full: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    probes = probes_of(name, full[name], 5, torch.Generator().manual_seed(1))
    assert len(probes) == 5
    assert all(full[name][probe["row"], probe["column"]] == probe["value"] for probe in probes)
    again = probes_of(name, full[name], 5, torch.Generator().manual_seed(2))
    assert probes != again


def test_experts_are_left_to_the_checksums() -> None:
    assert not can_probe("model.layers.0.mlp.experts.3.gate_proj.weight")
    assert can_probe("model.layers.0.mlp.gate.weight")
