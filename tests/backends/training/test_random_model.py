from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles_plan.backends.torch_engine import weights
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.backends.training import random_model
from miles_plan.backends.training.checkpoint_reader import stored_shapes
from miles_plan.backends.training.decoder_config import FAMILIES


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture
def large(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large from here on, and is cut into many pieces and files."""
    for family in FAMILIES:
        checkpoint(family)
    monkeypatch.setattr(weights, "LARGE_PARAMETERS", 0)
    monkeypatch.setattr(random_model, "PIECE_ELEMENTS", 1000)
    monkeypatch.setattr(random_model, "SHARD_BYTES", 40_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_model_has_the_tensors_and_the_distributions_of_the_real_class(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, large: None
) -> None:
    real = checkpoint(family)
    config = json.loads((real / "config.json").read_text())
    initialise_checkpoint(config, tmp_path / "model", 0)
    assert stored_shapes(tmp_path / "model") == stored_shapes(real)
    made, expected = tensors(tmp_path / "model"), tensors(real)
    for name, tensor in expected.items():
        assert float(made[name].std(correction=0)) == pytest.approx(float(tensor.std(correction=0)), rel=0.15, abs=1e-3), name
        assert float(made[name].mean()) == pytest.approx(float(tensor.mean()), abs=0.04), name
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {**written, "dtype": "float32"} == config


def test_a_large_model_is_known_by_transformers(checkpoint: Callable[[str], Path], tmp_path: Path, large: None) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text())
    initialise_checkpoint(config, tmp_path / "model", 0, large_dtype=torch.bfloat16)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16


def test_the_seed_and_nothing_else_decides(checkpoint: Callable[[str], Path], tmp_path: Path, large: None) -> None:
    config = json.loads((checkpoint("qwen3") / "config.json").read_text())
    state = torch.get_rng_state()
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        initialise_checkpoint(config, tmp_path / name, seed)
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1] != found[2]
    assert len(found[0]) > 3, "several shards"
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing is left beside"
    pieces = tensors(tmp_path / "a")["model.embed_tokens.weight"].flatten().split(1000)
    assert not torch.equal(pieces[0], pieces[1]), "every piece has numbers of its own"
