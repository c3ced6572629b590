"""A speculative draft in the manner of EAGLE (arXiv 2401.15077): one decoder layer that reads the policy's hidden states.

At position j it sees the token there and the policy's hidden state before it, attends to its own past, and says token j + 1.
After token t is sampled the policy's state t - 1 is known, so one step of the draft is one token ahead of the policy; further
steps put the draft's own output in the place of the policy's state. Embedding, final norm and output layer are the policy's
and stay outside: callers pass embedded tokens in and hand the output to the policy's `logits`, so that no gradient can reach
them from here. The layer is dense also for a mixture of experts. Each tensor-parallel rank computes the whole of it.

Where EAGLE regresses features besides, this draft learns by cross-entropy alone; and like DeepSeek-V3's multi-token prediction
(arXiv 2412.19437, equation 21) it norms state and embedding before it joins them. It is trained one step deep.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from miles_plan.backends.torch_engine.decoder import Decoder, PagedBatch
from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Parameter, Shard, Weights, parameters
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.ir.layout import TrainLayout
from miles_plan.kernels.attention import PackedSequences, PreparedKeyValue
from miles_plan.kernels.matmul import matmul
from miles_plan.kernels.rms_norm import rms_norm

PREFIX = "draft."  # before a draft tensor's name wherever it travels beside the policy's
_SHARD = Shard(layers=range(1), first_stage=False, last_stage=False)
_STATE_NORM, _EMBEDDING_NORM, _JOIN = "state_norm.weight", "embedding_norm.weight", "join.weight"


class Draft:
    """The draft of one policy, without its weights: those are passed to every call."""

    def __init__(self, policy: DecoderConfig, *, device: str = "cpu") -> None:
        self.config = replace(policy, num_layers=1, moe_layers=())
        self._decoder = Decoder(self.config, _SHARD, open_mesh(TrainLayout(), 0), device=device)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the draft with its shape, in order."""
        hidden = self.config.hidden_size
        joining = {_STATE_NORM: (hidden,), _EMBEDDING_NORM: (hidden,), _JOIN: (hidden, 2 * hidden)}
        return joining | {each.name: each.shape for each in self._layer_parameters()}

    def initial_weights(self, seed: int, *, dtype: torch.dtype, device: str = "cpu") -> Weights:
        """Weights drawn from the seed: matrices normal with variance 1 / inputs, norms one, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in self.shapes.items():
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
            else:
                tensor = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
            weights[name] = tensor.to(device=device, dtype=dtype)
        return weights

    def forward_packed(
        self, weights: Weights, prepared: PreparedWeights, states: Tensor, embedded: Tensor, sequences: PackedSequences
    ) -> Tensor:
        """Outputs [M, H] over packed sequences, from the policy's states before each token (zeros before the first) and the
        tokens' embeddings, [M, H] each. Differentiable."""
        joined = self._join(weights, prepared, states, embedded)
        return self._decoder.forward_packed(weights, prepared, joined, sequences).hidden

    def forward_paged(
        self,
        weights: Weights,
        prepared: PreparedWeights,
        states: Tensor,
        embedded: Tensor,
        batch: PagedBatch,
        pool: PreparedKeyValue,
    ) -> Tensor:
        """The same over new tokens, reading and filling the draft's own layer of the KV cache."""
        joined = self._join(weights, prepared, states, embedded)
        return self._decoder.layers_paged(weights, prepared, joined, batch, (pool,)).hidden

    def _join(self, weights: Weights, prepared: PreparedWeights, states: Tensor, embedded: Tensor) -> Tensor:
        epsilon = self.config.rms_norm_epsilon
        parts = (
            rms_norm(states, weights[_STATE_NORM], epsilon=epsilon),
            rms_norm(embedded, weights[_EMBEDDING_NORM], epsilon=epsilon),
        )
        weight = weights[_JOIN]
        return matmul(torch.cat(parts, dim=-1), weight, prepared=prepared.get(_JOIN, weight))

    def _layer_parameters(self) -> tuple[Parameter, ...]:
        return parameters(self.config, _SHARD)


def states_before(states: Tensor, starts: Tensor, first: Tensor) -> Tensor:
    """The state before each packed token, [M, H]: its neighbour's, and at the sequences' starts int64 [B] those of `first`."""
    shifted = torch.roll(states, 1, dims=0)
    shifted[starts] = first
    return shifted
