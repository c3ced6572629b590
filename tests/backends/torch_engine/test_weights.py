from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_plan.backends.torch_engine.mesh import stage_layers
from miles_plan.backends.torch_engine.weights import (
    Shard,
    empty_weights,
    full_names,
    initialise_checkpoint,
    load_weights,
    parameters,
    pieces_by_name,
    place,
    vocab_range,
)
from miles_plan.backends.training.decoder_config import read_config
from miles_plan.ir.layout import TrainLayout

FAMILIES = ["llama_biased_llama3_rope", "qwen2", "qwen3_tied", "qwen3_moe_mixed"]


def shards(family: str, layout: TrainLayout, num_layers: int) -> list[Shard]:
    """One shard per (tp, ep, pp) coordinate."""
    return [
        Shard(
            tp_rank=tp,
            tp=layout.tp,
            ep_rank=ep,
            ep=layout.ep,
            layers=layers,
            first_stage=stage == 0,
            last_stage=stage == layout.pp - 1,
        )
        for stage, layers in enumerate(stage_layers(layout, num_layers))
        for ep in range(layout.ep)
        for tp in range(layout.tp)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_what_the_checkpoint_holds(family: str, checkpoint: Callable[[str], Path]) -> None:
    stored = load_file(checkpoint(family) / "model.safetensors")
    assert full_names(read_config(checkpoint(family))) == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama_biased_llama3_rope", TrainLayout(tp=2, pp=2)),
        ("qwen2", TrainLayout(tp=2)),
        ("qwen3_tied", TrainLayout(tp=2)),
        ("qwen3_moe_mixed", TrainLayout(tp=2, dp=4, ep=4, pp=2, etp=2)),
    ],
    ids=str,
)
def test_shards_hold_every_element_exactly_once(family: str, layout: TrainLayout, checkpoint: Callable[[str], Path]) -> None:
    """Each element of a full tensor carries its own number; the shards together hold all numbers, in the right places."""
    config = read_config(checkpoint(family))
    counts = {name: torch.zeros(shape) for name, shape in full_names(config).items()}
    for shard in shards(family, layout, config.num_layers):
        found = parameters(config, shard)
        weights = empty_weights(found, torch.float32)
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {p.name: p.shape for p in found}
        for name, (_, piece) in pieces_by_name(found).items():
            owners = (1 if piece.sharded else layout.tp) * (1 if piece.expert is not None else layout.ep)
            counts[name].narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1 / owners)
    for name, count in counts.items():
        torch.testing.assert_close(count, torch.ones_like(count), msg=name)


def test_placing_full_tensors_equals_loading(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen3_moe_mixed")
    config = read_config(directory)
    stored = load_file(directory / "model.safetensors")
    for shard in shards("qwen3_moe_mixed", TrainLayout(tp=2, dp=2, ep=2, pp=2, etp=2), config.num_layers):
        found = parameters(config, shard)
        weights, owned = empty_weights(found, torch.bfloat16), pieces_by_name(found)
        placed = {name for name, tensor in stored.items() if place(weights, owned, name, tensor)}
        assert placed == set(owned)
        loaded = load_weights(directory, config, shard, dtype=torch.bfloat16)
        assert all(torch.equal(weights[name], loaded[name]) for name in loaded)
    with pytest.raises(ValueError, match=r"weight 'lm_head\.weight' has shape \[2, 2\], the model expects \[41, 64\]"):
        place(weights, owned, "lm_head.weight", torch.ones(2, 2))


def test_a_sharded_checkpoint_is_read_through_its_index(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("qwen3")
    stored = load_file(source / "model.safetensors")
    names = sorted(stored)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: stored[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = read_config(source)
    shard = Shard(layers=range(config.num_layers))
    expected = load_weights(source, config, shard, dtype=torch.float32)
    found = load_weights(tmp_path, config, shard, dtype=torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_that_do_not_fit_are_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("qwen3")
    config, shard = read_config(source), Shard(layers=range(2))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_weights(tmp_path, config, shard, dtype=torch.float32)
    stored = load_file(source / "model.safetensors")
    save_file({**stored, "model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \[3\], config\.json asks for \[64\]"):
        load_weights(tmp_path, config, shard, dtype=torch.float32)
    stored.pop("model.norm.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 tensors that the model needs, such as 'model\.norm\.weight'"):
        load_weights(tmp_path, config, shard, dtype=torch.float32)


def test_the_same_seed_gives_the_same_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text())
    state = torch.get_rng_state()
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        initialise_checkpoint(config, tmp_path / name, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing is left beside"


def test_configs_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers has no model for model_type='nonsense'"):
        initialise_checkpoint({"model_type": "nonsense"}, tmp_path / "model", seed=0)
    with pytest.raises(ValueError, match="model_type 'gpt2' is not one of"):
        initialise_checkpoint({"model_type": "gpt2"}, tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "tp"), [(41, 2), (40, 3), (2, 4)])
def test_vocabulary_shares_are_consecutive(vocab_size: int, tp: int) -> None:
    shares = [vocab_range(vocab_size, rank, tp) for rank in range(tp)]
    assert [token for start, stop in shares for token in range(start, stop)] == list(range(vocab_size))
