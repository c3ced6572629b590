"""Tables of cos and sin: by Megatron-core's and SGLang's expressions, and the same whatever their length."""

from __future__ import annotations

import pytest
import torch
import transformers

from miles_plan.backends.training.decoder_config import decoder_config
from miles_plan.kernels.cuda.rope_table import angles_of, inverse_frequencies, rotation_tables, scaled_frequencies


def test_a_tables_length_does_not_show() -> None:
    inverse = inverse_frequencies(1e6, 128)
    long, short = rotation_tables(angles_of(inverse, 5000)), rotation_tables(angles_of(inverse, 37))
    assert torch.equal(long[0][:37], short[0])
    assert torch.equal(long[1][:37], short[1])


def test_tables_are_close_to_float64() -> None:
    inverse = inverse_frequencies(10_000.0, 64)
    exact = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(inverse.double(), exact, rtol=1e-6, atol=0)
    cos, sin = rotation_tables(angles_of(inverse, 100), scale=1.5)
    angle = torch.arange(100, dtype=torch.float64)[:, None] * exact
    torch.testing.assert_close(cos.double(), 1.5 * torch.cos(angle), rtol=0, atol=2e-5)
    torch.testing.assert_close(sin.double(), 1.5 * torch.sin(angle), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("base", "size"), [(10_000, 64), (500_000, 128), (1_000_000, 128), (5_000_000.0, 128)])
def test_a_trainer_that_reads_the_models_config_has_the_same_frequencies(base: float, size: int) -> None:
    """The trainers take transformers' frequencies, SGLang's hooks these: one bit of one of them shows in equal bits' runs."""
    config = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=size, rope_theta=base
    )
    theirs = torch.tensor(decoder_config(config).inverse_frequencies, dtype=torch.float32)
    assert torch.equal(theirs, inverse_frequencies(base, size))


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize(("base", "size", "context"), [(10_000.0, 64, 64), (500_000.0, 128, 8192)])
def test_scaled_frequencies_are_transformers_to_the_bit(kind: str, base: float, size: int, context: int) -> None:
    parameters = {"rope_type": kind, "rope_theta": base, "factor": 8.0}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": context}
    config = transformers.LlamaConfig(
        hidden_size=size, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, rope_parameters=parameters
    )
    theirs = torch.tensor(decoder_config(config).inverse_frequencies, dtype=torch.float32)
    ours = scaled_frequencies(inverse_frequencies(base, size), config.rope_parameters)
    assert ours is not None
    assert torch.equal(ours, theirs)
    assert scaled_frequencies(ours, {"rope_type": "yarn"}) is None
