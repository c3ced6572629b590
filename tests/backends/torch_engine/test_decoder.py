from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miles_plan.backends.torch_engine.config import read_config
from miles_plan.backends.torch_engine.decoder import Decoder
from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Weights, load_weights, shard_of_rank
from miles_plan.ir.layout import TrainLayout
from miles_plan.kernels.attention import pack_sequences

FAMILIES = ["llama", "llama_biased_llama3_rope", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe", "qwen3_moe_mixed"]
LENGTHS = [7, 1, 23, 64]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Weights]:
    layout = TrainLayout()
    config, mesh = read_config(directory), open_mesh(layout, 0)
    shard = shard_of_rank(mesh, layout, config)
    return Decoder(config, shard, mesh), load_weights(directory, config, shard, dtype=dtype)


def random_tokens(vocab_size: int, count: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_match_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    decoder, weights = load(checkpoint(family))
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    tokens = random_tokens(decoder.config.vocab_size)
    prepared = PreparedWeights()
    output = decoder.forward_packed(weights, prepared, decoder.embed(weights, tokens), pack_sequences(LENGTHS))
    logits = decoder.logits(weights, prepared, output.hidden)

    expected = torch.cat([reference(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)

    log_probs, _ = decoder.log_probs_of_logits(logits, tokens, temperature=1.0)
    log_probs.sum().backward()
    torch.log_softmax(expected, dim=-1).gather(1, tokens[:, None]).sum().backward()
    embedding_grad = reference.get_input_embeddings().weight.grad
    torch.testing.assert_close(weights["model.embed_tokens.weight"].grad, embedding_grad, atol=2e-3, rtol=2e-3)
    norm_grad = reference.model.layers[0].input_layernorm.weight.grad
    torch.testing.assert_close(weights["model.layers.0.input_layernorm.weight"].grad, norm_grad, atol=2e-3, rtol=2e-3)
