"""AdamW with fp32 masters over parameter buffers: each rank updates the chunk it owns, then weights are gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_plan.backends.torch_engine.parameter_buffers import ParameterBuffer
from miles_plan.backends.training.learning_rate import learning_rate
from miles_plan.ir.options import OptimizerOptions
from miles_plan.kernels.collectives import RankGroup


@dataclass(frozen=True, slots=True, eq=False)
class AdamState:
    """Float32 masters and moments of one buffer's chunk, [chunk_size] each."""

    masters: Tensor
    first_moment: Tensor
    second_moment: Tensor


class ShardedAdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on this rank's chunks of some buffers.

    masters: float32 chunk of each buffer's initial weights, kept and changed here; group: all ranks of the trainer, over which
    the gradient norm is taken.
    """

    def __init__(self, buffers: Sequence[ParameterBuffer], masters: Sequence[Tensor], group: RankGroup) -> None:
        self.buffers = tuple(buffers)
        self.group = group
        self.states = tuple(AdamState(own, torch.zeros_like(own), torch.zeros_like(own)) for own in masters)
        self.steps_taken = 0

    def step(self, options: OptimizerOptions) -> dict[str, float]:
        """Reduce gradients, clip them by their global norm, update masters and weights; gradients are spent afterwards.

        A norm that is not finite skips the update on all ranks. Metrics: grad_norm (before clipping), learning_rate (of this
        step), skipped_steps (1.0 or 0.0).
        """
        chunks = [buffer.reduce_gradients() for buffer in self.buffers]
        norm = self._global_norm(chunks)
        if not math.isfinite(norm):
            return self.skip(options, norm)
        rate = learning_rate(options, self.steps_taken)
        self.steps_taken += 1
        scale = min(1.0, options.clip_grad_norm / (norm + 1e-6)) if options.clip_grad_norm else 1.0
        for buffer, gradients, state in zip(self.buffers, chunks, self.states, strict=True):
            if scale < 1.0:
                gradients.mul_(scale)
            _update(state, gradients, buffer.own_spans("decayed"), options, rate=rate, step=self.steps_taken)
        self.publish()
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": 0.0}

    def skip(self, options: OptimizerOptions, norm: float = 0.0) -> dict[str, float]:
        """The metrics of a step that changes nothing."""
        return {"grad_norm": norm, "learning_rate": learning_rate(options, self.steps_taken), "skipped_steps": 1.0}

    def publish(self) -> None:
        """Set the weights of all replicas from everyone's masters."""
        for buffer, state in zip(self.buffers, self.states, strict=True):
            buffer.weights.copy_(buffer.gather_chunks(state.masters))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name; the tensors themselves, not copies."""
        return {
            f"buffer{index}.{name}": getattr(state, name)
            for index, state in enumerate(self.states)
            for name in ("masters", "first_moment", "second_moment")
        }

    def _global_norm(self, chunks: Sequence[Tensor]) -> float:
        """Norm over all parameters, each counted once; the same number on every rank, added in rank order."""
        squares = torch.zeros(1, dtype=torch.float64)
        for buffer, gradients in zip(self.buffers, chunks, strict=True):
            for span in buffer.own_spans("counted"):
                squares += torch.linalg.vector_norm(gradients[span], dtype=torch.float64).cpu() ** 2
        total = float(torch.cat(self.group.all_gather(squares)).sum())
        return math.sqrt(total) if math.isfinite(total) else total


def _update(
    state: AdamState, gradients: Tensor, decayed: Sequence[slice], options: OptimizerOptions, *, rate: float, step: int
) -> None:
    if options.weight_decay:
        for span in decayed:
            state.masters[span].mul_(1.0 - rate * options.weight_decay)
    state.first_moment.lerp_(gradients, 1.0 - options.beta1)
    state.second_moment.mul_(options.beta2).addcmul_(gradients, gradients, value=1.0 - options.beta2)
    deviation = state.second_moment.sqrt().div_(math.sqrt(1.0 - options.beta2**step)).add_(options.epsilon)
    state.masters.addcdiv_(state.first_moment, deviation, value=-rate / (1.0 - options.beta1**step))
