"""The weight map is a bijection for every layout: nothing lost, nothing twice, whatever the axes. Needs no Megatron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from miles_plan.backends.megatron_engine.full_weights import fill_full
from miles_plan.backends.megatron_engine.weight_map import LocalParameter, load_local, local_parameters, padded_vocab_size
from miles_plan.backends.torch_engine.weights import full_names
from miles_plan.backends.training.decoder_config import DecoderConfig, decoder_config
from miles_plan.ir.layout import TrainLayout
from tests.backends.sample_trainers import MODELS

DENSE_LAYOUTS = [
    TrainLayout(),
    TrainLayout(tp=2),
    TrainLayout(tp=2, cp=2, dp=2, sequence_parallel=True),
    TrainLayout(pp=2),
    TrainLayout(pp=2, vpp=2),
    TrainLayout(pp=3, stage_layers=(1, 2, 1)),
    TrainLayout(tp=2, pp=2, dp=2),
]
MOE_LAYOUTS = [
    TrainLayout(dp=2, ep=2),
    TrainLayout(tp=2, ep=2, sequence_parallel=True),
    TrainLayout(tp=2, etp=2, sequence_parallel=True),
    TrainLayout(tp=2, dp=4, ep=4, etp=2, sequence_parallel=True),
    TrainLayout(dp=4, ep=2, pp=2, vpp=2),
    TrainLayout(tp=2, cp=2, dp=2, ep=8, sequence_parallel=True),
]
CASES = [
    *((model, layout) for model in ("dense", "tied", "biased", "moe", "moe_mixed") for layout in DENSE_LAYOUTS),
    *((model, layout) for model in ("moe", "moe_mixed") for layout in MOE_LAYOUTS),
]


def config_of(model: str) -> DecoderConfig:
    fields: dict[str, Any] = dict(MODELS[model])
    return decoder_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def random_model(config: DecoderConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in full_names(config).items()}


def sharded(config: DecoderConfig, layout: TrainLayout, full: Any, layers: Any) -> list[list[tuple[LocalParameter, Any]]]:
    """Every rank's parameters, filled."""
    ranks = []
    for rank in range(layout.world_size):
        held = [(each, torch.full(each.shape, torch.nan)) for each in local_parameters(config, layout, rank, layers=layers)]
        for parameter, local in held:
            load_local(parameter, local, full)
        ranks.append(held)
    return ranks


def gathered(config: DecoderConfig, layout: TrainLayout, ranks: Any, monkeypatch: Any) -> dict[str, torch.Tensor]:
    """What the sum of all ranks' bytes holds."""
    total: dict[str, torch.Tensor] = {}
    for held in ranks:
        flat = torch.zeros(4 * sum(torch.Size(shape).numel() for shape in full_names(config).values()), dtype=torch.uint8)
        views, offset = {}, 0
        for name, shape in full_names(config).items():
            size = 4 * torch.Size(shape).numel()
            views[name] = flat[offset : offset + size].view(torch.float32).view(shape)
            offset += size
        monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
        fill_full(flat, views, held, layout)
        for name, view in views.items():
            bits = view.view(torch.int32)
            assert not (total[name].bool() & bits.bool()).any() if name in total and len(ranks) > 1 else True
            total[name] = total[name] + bits if name in total else bits.clone()
    return {name: bits.view(torch.float32) for name, bits in total.items()}


def complete(layout: TrainLayout) -> bool:
    return layout.tp * layout.pp * layout.ep * layout.etp == 1


@pytest.mark.parametrize("layers", ["transformer_engine", "local"])
@pytest.mark.parametrize(("model", "layout"), CASES, ids=lambda each: str(each).replace(" ", "_"))
def test_shards_add_up_to_the_model_bit_for_bit(model, layout, layers, monkeypatch):
    config = config_of(model)
    full = random_model(config)
    ranks = sharded(config, layout, full, layers)
    assert all(not tensor.isnan().any() for held in ranks for _, tensor in held)
    found = gathered(config, layout, ranks[:1] if complete(layout) else ranks, monkeypatch)
    assert found.keys() == full.keys()
    for name, tensor in full.items():
        assert (found[name].view(torch.int32) == tensor.view(torch.int32)).all(), name


@pytest.mark.parametrize(("model", "layout"), CASES, ids=lambda each: str(each).replace(" ", "_"))
def test_every_element_has_one_owner_and_names_are_unique(model, layout):
    config = config_of(model)
    owners = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in full_names(config).items()}
    for rank in range(layout.world_size):
        parameters = local_parameters(config, layout, rank, layers="transformer_engine")
        assert len({(each.chunk, each.name) for each in parameters}) == len(parameters)
        for parameter in parameters:
            for piece in parameter.pieces:
                if parameter.owned:
                    piece.of_full(owners[piece.name]).add_(1)
    assert all((count == 1).all() for count in owners.values())


def test_weights_move_from_one_layout_to_another(monkeypatch):
    config = config_of("moe")
    full = random_model(config)
    before, after = TrainLayout(dp=4, ep=2, pp=2), TrainLayout(tp=2, etp=2, pp=2, vpp=2, sequence_parallel=True)
    through = gathered(config, before, sharded(config, before, full, "transformer_engine"), monkeypatch)
    direct, moved = (sharded(config, after, each, "local") for each in (full, through))
    for ours, theirs in zip(moved, direct, strict=True):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_query_key_and_value_of_a_group_stand_together():
    config = config_of("dense")  # 4 heads, 2 groups, head_dim 16
    [qkv] = [
        each
        for each in local_parameters(config, TrainLayout(), 0, layers="local")
        if each.name.endswith("0.self_attention.linear_qkv.weight")
    ]
    assert [(piece.name.rpartition(".")[0][-6:], piece.start, piece.stop, piece.offset) for piece in qkv.pieces] == [
        ("q_proj", 0, 32, 0),
        ("k_proj", 0, 16, 32),
        ("v_proj", 0, 16, 48),
        ("q_proj", 32, 64, 64),
        ("k_proj", 16, 32, 96),
        ("v_proj", 16, 32, 112),
    ]


def test_tables_are_padded_as_megatron_pads_them():
    assert padded_vocab_size(151936, 1, "transformer_engine") == 151936
    assert padded_vocab_size(151936, 2, "transformer_engine") == 152064
    assert padded_vocab_size(151936, 2, "batch_invariant") == 151936
    parameters = local_parameters(config_of("dense"), TrainLayout(tp=2), 1, layers="local")  # 41 tokens, padded to 256
    table = next(each for each in parameters if each.name == "embedding.word_embeddings.weight")
    assert table.shape[0] == 128
    assert not table.pieces
