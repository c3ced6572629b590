from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_plan.backends.torch_engine import decoder as decoder_module
from miles_plan.backends.torch_engine.decoder import Decoder
from miles_plan.backends.torch_engine.mesh import check_train_layout, open_mesh
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import (
    Weights,
    full_names,
    gather_full_tensors,
    load_weights,
    shard_of_rank,
)
from miles_plan.backends.training.decoder_config import read_config
from miles_plan.ir.layout import TrainLayout
from miles_plan.kernels.attention import pack_sequences

FAMILIES = ["llama", "llama_biased_llama3_rope", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe", "qwen3_moe_mixed"]
LENGTHS = [7, 1, 23, 64]
ONE_RANK = TrainLayout()


def load(
    directory: Path, *, layout: TrainLayout = ONE_RANK, rank: int = 0, rendezvous: str | None = None
) -> tuple[Decoder, Weights]:
    config, mesh = read_config(directory), open_mesh(layout, rank, rendezvous=rendezvous, timeout_s=60)
    check_train_layout(layout, config)
    shard = shard_of_rank(mesh, layout, config)
    return Decoder(config, shard, mesh), load_weights(directory, config, shard, dtype=torch.float32)


def run_training(
    decoder: Decoder, weights: Weights, tokens: Tensor, recompute: str, *, replay: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the tokens (on the last stage) and gradients of a weighted sum of them, through all pipeline stages."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    prepared, sequences, pp = PreparedWeights(), pack_sequences(LENGTHS), decoder.mesh.pp
    if decoder.shard.first_stage:
        hidden = decoder.embed(weights, tokens)
    else:
        hidden = pp.receive(torch.empty(len(tokens), decoder.config.hidden_size), pp.rank - 1).requires_grad_()
    output = decoder.forward_packed(weights, prepared, hidden, sequences, replay=replay, recompute=recompute)
    if not decoder.shard.last_stage:
        pp.send(output.hidden.detach(), pp.rank + 1)
        output.hidden.backward(pp.receive(torch.empty_like(output.hidden), pp.rank + 1))
        found = torch.empty(0)
    else:
        found, _ = decoder.log_probs(weights, prepared, output.hidden, tokens, temperature=0.9)
        (found * torch.linspace(-1, 1, len(tokens))).sum().backward()
    if not decoder.shard.first_stage:
        pp.send(hidden.grad, pp.rank - 1)
    return found.detach(), {name: tensor.grad for name, tensor in weights.items()}


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


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe_mixed"])
def test_recompute_changes_no_bit(family: str, recompute: str, checkpoint: Callable[[str], Path]) -> None:
    decoder, weights = load(checkpoint(family))
    tokens = random_tokens(decoder.config.vocab_size)
    plain = run_training(decoder, weights, tokens, "none")
    recomputed = run_training(decoder, weights, tokens, recompute)
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(plain[1][name], recomputed[1][name]) for name in weights)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama_biased_llama3_rope", TrainLayout(tp=2)),
        ("qwen2", TrainLayout(tp=2)),
        ("qwen3_tied", TrainLayout(tp=2)),
        ("qwen3", TrainLayout(tp=2, pp=2)),
        ("qwen3_moe", TrainLayout(tp=2, etp=2)),
        ("qwen3_moe_mixed", TrainLayout(dp=2, ep=2)),
        ("qwen3_moe_mixed", TrainLayout(dp=2, ep=2, tp=2, etp=2)),
        ("qwen3_moe", TrainLayout(pp=2, stage_layers=(1, 1))),
    ],
    ids=str,
)
def test_layouts_change_no_bit_of_the_forward_and_little_of_the_gradients(
    family: str,
    layout: TrainLayout,
    checkpoint: Callable[[str], Path],
    run_ranks: Callable[[int, Callable[[int, str], Any]], list[Any]],
) -> None:
    directory = checkpoint(family)
    decoder, weights = load(directory)
    tokens = random_tokens(decoder.config.vocab_size)
    expected, gradients = run_training(decoder, weights, tokens, "none")
    full_gradients = dict(gather_full_tensors(gradients, decoder.config, decoder.shard, decoder.mesh))

    def rank_main(rank: int, rendezvous: str) -> tuple[Tensor, dict[str, Tensor]]:
        own_decoder, own_weights = load(directory, layout=layout, rank=rank, rendezvous=rendezvous)
        found, own_gradients = run_training(own_decoder, own_weights, tokens, "none")
        gathered = gather_full_tensors(own_gradients, own_decoder.config, own_decoder.shard, own_decoder.mesh)
        return found, {name: tensor.clone() for name, tensor in gathered}

    seen: set[str] = set()
    for found, own_full in run_ranks(layout.world_size, rank_main):
        assert found.numel() == 0 or torch.equal(found, expected)
        for name, gradient in own_full.items():
            # every dp rank computes the whole batch here, so an expert that ep spreads sees each token dp times
            copies = layout.ep if ".experts." in name else 1
            torch.testing.assert_close(gradient / copies, full_gradients[name], rtol=2e-4, atol=2e-4, msg=name)
        seen |= set(own_full)
    assert seen == set(full_names(decoder.config))


def test_replay_uses_the_recorded_experts_and_counts_differences(checkpoint: Callable[[str], Path]) -> None:
    decoder, weights = load(checkpoint("qwen3_moe_mixed"))
    tokens = random_tokens(decoder.config.vocab_size)
    sequences = pack_sequences(LENGTHS)
    hidden = decoder.embed(weights, tokens)
    own = decoder.forward_packed(weights, PreparedWeights(), hidden, sequences)
    assert own.routing is not None
    assert own.routing.shape == (sum(LENGTHS), 2, 2)
    same = decoder.forward_packed(weights, PreparedWeights(), hidden, sequences, replay=own.routing)
    assert torch.equal(same.hidden, own.hidden)
    assert (same.mismatches, same.compared) == (0, 2 * sum(LENGTHS))
    other = own.routing.clone()
    other[3, 1] = (own.routing[3, 1] + 1) % 8
    changed = decoder.forward_packed(weights, PreparedWeights(), hidden, sequences, replay=other)
    assert changed.mismatches == 1
    rows = (changed.hidden != own.hidden).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [3], "the last layer's replay touches its token alone"
    with pytest.raises(ValueError, match="replay names expert 8, the model has 8"):
        decoder.forward_packed(weights, PreparedWeights(), hidden, sequences, replay=torch.full_like(other, 8))
    with pytest.raises(ValueError, match="replay must be int64"):
        decoder.forward_packed(weights, PreparedWeights(), hidden, sequences, replay=other[:5])


def test_replayed_gate_weights_pass_gradients_to_the_router(checkpoint: Callable[[str], Path]) -> None:
    decoder, weights = load(checkpoint("qwen3_moe"))
    tokens = random_tokens(decoder.config.vocab_size)
    _, gradients = run_training(decoder, weights, tokens, "none")
    routing = decoder.forward_packed(
        weights, PreparedWeights(), decoder.embed(weights, tokens), pack_sequences(LENGTHS)
    ).routing
    _, replayed = run_training(decoder, weights, tokens, "none", replay=routing)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, replayed[name])
    assert gradients["model.layers.0.mlp.gate.weight"].any()


def test_no_tokens_at_all(checkpoint: Callable[[str], Path]) -> None:
    decoder, weights = load(checkpoint("qwen3_moe"))
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    output = decoder.forward_packed(weights, PreparedWeights(), decoder.embed(weights, nothing), pack_sequences([]))
    log_probs, _ = decoder.log_probs(weights, PreparedWeights(), output.hidden, nothing, temperature=1.0)
    log_probs.sum().backward()
    assert log_probs.shape == (0,)
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in weights.values())


def test_a_changed_weight_is_prepared_again(checkpoint: Callable[[str], Path]) -> None:
    decoder, weights = load(checkpoint("llama"))
    tokens, prepared = random_tokens(decoder.config.vocab_size), PreparedWeights()

    def hidden() -> Tensor:
        return decoder.forward_packed(weights, prepared, decoder.embed(weights, tokens), pack_sequences(LENGTHS)).hidden

    before = hidden()
    assert torch.equal(hidden(), before)
    assert prepared.size_bytes > 0
    weights["model.layers.0.mlp.down_proj.weight"] *= 2
    assert not torch.equal(hidden(), before)
    prepared.clear()
    assert prepared.size_bytes == 0


def test_blocks_of_logits_change_no_bit(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, weights = load(checkpoint("qwen3"))
    tokens = random_tokens(decoder.config.vocab_size)
    whole = run_training(decoder, weights, tokens, "none")
    monkeypatch.setattr(decoder_module, "_MAX_LOGITS", 41 * 10)
    blocks = run_training(decoder, weights, tokens, "none")
    assert torch.equal(blocks[0], whole[0])
    for name, gradient in whole[1].items():
        torch.testing.assert_close(blocks[1][name], gradient, rtol=1e-4, atol=1e-4)
