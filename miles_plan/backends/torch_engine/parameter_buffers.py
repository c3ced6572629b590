"""Parameters, their gradients and their optimizer state in flat tensors, one buffer per group of replicas.

A parameter is a view into the flat weights, so one collective reduces all gradients, one vector operation updates all weights,
and parking a part on the host moves one tensor. Each replica owns one chunk of the buffer: it alone keeps the fp32 masters and
moments of it (ZeRO stage 1, arXiv 1910.02054; Megatron's distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from miles_plan.kernels.collectives import RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferedParameter:
    """A parameter and how its gradient is summed and counted.

    counted: this rank's copy enters the global gradient norm (of a parameter that tensor-parallel ranks hold alike, one copy
    does); decayed: weight decay applies; partial_over: a group whose ranks hold partial gradients that must be added first.
    """

    name: str
    parameter: Parameter
    counted: bool
    decayed: bool
    partial_over: RankGroup | None = None


class ParameterBuffer:
    """The parameters that the ranks of one group replicate, laid out in one flat tensor.

    weights: [n] in the compute dtype, or None while parked; gradients: float32 [n], or None while freed. n is padded to a
    multiple of the group's size, so that every rank owns an equal chunk.
    """

    def __init__(self, parameters: Sequence[BufferedParameter], group: RankGroup) -> None:
        # Alike parameters next to each other: a chunk then has few spans that are counted or decayed.
        self.parameters = sorted(parameters, key=lambda each: (each.counted, each.decayed))
        self.group = group
        self.offsets = _offsets([each.parameter.numel() for each in self.parameters])
        self.shapes = [each.parameter.shape for each in self.parameters]
        self.chunk_size = -(-self.offsets[-1] // self.group.size)
        self.gradients: Tensor | None = None
        self.weights: Tensor | None = None
        dtype = self.parameters[0].parameter.dtype if self.parameters else torch.float32
        flat = torch.zeros(self.chunk_size * self.group.size, dtype=dtype)
        for view, each in zip(self.views(flat), self.parameters, strict=True):
            view.copy_(each.parameter.detach())
            each.parameter.register_post_accumulate_grad_hook(self._accumulate)  # type: ignore[no-untyped-call]
        self._place = {id(each.parameter): number for number, each in enumerate(self.parameters)}
        self.attach_weights(flat)

    @property
    def chunk(self) -> slice:
        """The part of the flat tensors that this rank owns."""
        return slice(self.group.rank * self.chunk_size, (self.group.rank + 1) * self.chunk_size)

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Each parameter's place in a flat tensor, in its shape."""
        for offset, shape in zip(self.offsets, self.shapes, strict=False):
            yield flat[offset : offset + shape.numel()].view(shape)

    def attach_weights(self, flat: Tensor) -> None:
        """Make every parameter a view of `flat`."""
        self.weights = flat
        for view, each in zip(self.views(flat), self.parameters, strict=True):
            each.parameter.data = view

    def detach_weights(self) -> Tensor:
        """Leave every parameter empty and give the flat weights away, so that their memory can be freed."""
        flat, self.weights = self.weights, None
        assert flat is not None, "weights are already detached"
        for each in self.parameters:
            each.parameter.data = flat.new_empty(0)
        return flat

    def clear_gradients(self) -> None:
        """Gradients of zero; takes their memory where it was freed."""
        if self.gradients is None:
            self.gradients = torch.zeros(self.chunk_size * self.group.size, dtype=torch.float32)
        else:
            self.gradients.zero_()

    def _accumulate(self, parameter: Tensor) -> None:
        """Add what backward left into the fp32 gradients at once: bf16 sums over micro-batches would lose digits."""
        assert self.gradients is not None, "backward before clear_gradients"
        if parameter.grad is not None:
            offset = self.offsets[self._place[id(parameter)]]
            self.gradients[offset : offset + parameter.numel()].add_(parameter.grad.reshape(-1))
            parameter.grad = None

    def reduce_gradients(self) -> Tensor:
        """Sum of this rank's chunk over all replicas, float32 [chunk_size], added in rank order."""
        assert self.gradients is not None, "reduce before clear_gradients"
        for view, each in zip(self.views(self.gradients), self.parameters, strict=True):
            if each.partial_over is not None:
                each.partial_over.all_reduce_sum(view)
        one_row_each = [1] * self.group.size
        parts = self.group.all_to_all(self.gradients.view(self.group.size, -1), one_row_each, one_row_each)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def publish(self, masters: Tensor) -> None:
        """Weights of all replicas from everyone's fp32 chunk."""
        assert self.weights is not None, "publish while the weights are parked"
        chunks = self.group.all_gather(masters.to(self.weights.dtype))
        torch.cat(chunks, out=self.weights)

    def own_spans(self, attribute: str) -> list[slice]:
        """Spans of this rank's chunk whose parameters have the attribute (`counted` or `decayed`) set, adjacent ones joined."""
        spans: list[slice] = []
        start = self.chunk.start
        for offset, end, each in zip(self.offsets, self.offsets[1:], self.parameters, strict=False):
            low, high = max(offset - start, 0), min(end - start, self.chunk_size)
            if not getattr(each, attribute) or low >= high:
                continue
            if spans and spans[-1].stop == low:
                low = spans.pop().start
            spans.append(slice(low, high))
        return spans


def _offsets(sizes: Sequence[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
