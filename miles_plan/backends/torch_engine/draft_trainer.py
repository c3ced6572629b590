"""The draft as the trainer holds it: its weights and AdamW state beside the policy's, and the loss it learns by.

The policy is read and never written: its hidden states come without gradient, and embedding, final norm and output layer are
passed in detached.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.torch_engine.decoder import Decoder
from miles_plan.backends.torch_engine.draft import PREFIX, Draft, states_before
from miles_plan.backends.torch_engine.mesh import Mesh
from miles_plan.backends.torch_engine.optimizer import ShardedAdamW
from miles_plan.backends.torch_engine.parameter_buffers import BufferedParameter, ParameterBuffer
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Weights
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.backends.training.packed_samples import PackedSamples
from miles_plan.data.batch import SampleBatch


class DraftTrainer:
    """One rank's draft: replicated over tensor-parallel ranks, its optimizer state sharded over data-parallel ones.

    ValueError for a mesh with pipeline stages: the last one has the hidden states and not the embedding.
    """

    def __init__(self, config: DecoderConfig, mesh: Mesh, *, dtype: torch.dtype, device: str, seed: int) -> None:
        if mesh.pp.size > 1:
            raise ValueError(f"the embedded trainer trains a draft without pipeline stages, got pp={mesh.pp.size}")
        self.draft = Draft(config, device=device)
        layout = [
            BufferedParameter(name=name, shape=shape, counted=mesh.tp.rank == 0, decayed=len(shape) > 1)
            for name, shape in self.draft.shapes.items()
        ]
        self.buffer = ParameterBuffer(layout, mesh.dp, dtype=dtype, device=device)
        initial = self.draft.initial_weights(seed, dtype=torch.float32, device=device)
        masters = self.buffer.flatten(initial)[self.buffer.chunk].clone()
        self.optimizer = ShardedAdamW((self.buffer,), [masters], mesh.world)
        self.optimizer.publish()

    def exported(self) -> dict[str, Tensor]:
        """The draft's tensors as they travel beside the policy's."""
        return {PREFIX + name: tensor.detach() for name, tensor in self.buffer.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank's draft; the tensors themselves, but for the step count."""
        held = {PREFIX + name: tensor for name, tensor in self.optimizer.tensors().items()}
        return {**held, f"{PREFIX}steps_taken": torch.tensor(self.optimizer.steps_taken)}

    def restore(self, found: dict[str, Tensor]) -> None:
        """Take what `state` gave."""
        for name, tensor in self.optimizer.tensors().items():
            tensor.copy_(found[PREFIX + name])
        self.optimizer.steps_taken = int(found[f"{PREFIX}steps_taken"])
        self.optimizer.publish()

    def forward(
        self, decoder: Decoder, policy: Weights, prepared: PreparedWeights, part: PackedSamples, states: Tensor
    ) -> Tensor:
        """The draft's outputs [M, H] over a micro-batch, to be read by the policy's output layer.

        decoder, policy: the policy's, its weights detached; states [M, H]: its hidden states. `prepared` holds forms of the
        policy's and the draft's weights and is good for one step.
        """
        starts = torch.from_numpy(np.cumsum([0, *part.sequences.lengths[:-1]])).to(states.device)
        before = states_before(states, starts, torch.zeros_like(states[:1]))
        embedded = decoder.embed(policy, part.tokens)
        return self.draft.forward_packed(self.buffer.parameters, prepared, before, embedded, part.sequences)

    def learn(
        self, decoder: Decoder, policy: Weights, prepared: PreparedWeights, part: PackedSamples, states: Tensor, rows: Tensor
    ) -> tuple[Tensor, int]:
        """As `forward`, then the summed negative log-prob of the response tokens where `rows`, bool [r], is set, and how many
        of them are the draft's likeliest token."""
        hidden = self.forward(decoder, policy, prepared, part, states)
        hidden, targets = hidden.index_select(0, part.predicting[rows]), part.targets[rows]
        log_probs, _ = decoder.log_probs(policy, prepared, hidden, targets, temperature=1.0)
        right = int((decoder.likeliest(policy, prepared, hidden.detach()) == targets).sum())
        return -log_probs.sum(), right


def drafted_rows(batch: SampleBatch, part: PackedSamples) -> Tensor:
    """Which response tokens of a micro-batch the rollout drafts, bool [r]: all but the first of each response."""
    rows = ~np.isin(part.answers, batch.response_start[part.samples])
    return torch.from_numpy(rows).to(part.tokens.device)


def num_drafted(batch: SampleBatch) -> int:
    """Response tokens of the whole batch that the rollout drafts."""
    return int(np.maximum(batch.response_length.astype(np.int64) - 1, 0).sum())
