"""Parameters, their gradients and their optimizer state in flat tensors, one buffer per group of replicas.

A parameter is a view into the flat weights, so one collective reduces all gradients, one vector operation updates all weights,
and parking a part on the host moves one tensor. Each replica owns one chunk of the buffer: it alone keeps the fp32 masters and
moments of it (ZeRO stage 1, arXiv 1910.02054; Megatron's distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferedParameter:
    """A parameter's name and shape, and what the optimizer does with it.

    counted: this rank's copy enters the global gradient norm (of a parameter that tensor-parallel ranks hold alike, one copy
    does); decayed: weight decay applies.
    """

    name: str
    shape: tuple[int, ...]
    counted: bool = True
    decayed: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


class ParameterBuffer:
    """The parameters that the ranks of one group replicate, laid out in one flat tensor.

    weights: [n] in the compute dtype, or None while parked; gradients: float32 [n], or None while freed; parameters: the views
    of the weights that autograd sees, by name. n is padded to a multiple of the group's size, so that every rank owns an equal
    chunk.
    """

    def __init__(
        self, layout: Sequence[BufferedParameter], group: RankGroup, *, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        # Alike parameters next to each other: a chunk then has few spans that are counted or decayed.
        self.layout = sorted(layout, key=lambda each: (each.counted, each.decayed))
        self.group = group
        self.dtype, self.device = dtype, device
        self.offsets = _offsets([each.size for each in self.layout])
        self.chunk_size = -(-self.offsets[-1] // group.size)
        self.chunk = slice(group.rank * self.chunk_size, (group.rank + 1) * self.chunk_size)
        self.weights: Tensor | None = None
        self.gradients: Tensor | None = None
        self.parameters: dict[str, Tensor] = {}

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A flat tensor from one tensor for each parameter, zero in the padding."""
        flat = torch.zeros(self.chunk_size * self.group.size, dtype=dtype, device=self.device)
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's place in a flat tensor, in its shape."""
        return {
            each.name: flat[offset : offset + each.size].view(each.shape)
            for offset, each in zip(self.offsets, self.layout, strict=False)
        }

    def attach_weights(self, flat: Tensor) -> None:
        """Take `flat` as the weights; the parameters are new views of it."""
        self.weights = flat
        self.parameters = {name: view.detach().requires_grad_() for name, view in self.views(flat).items()}
        for offset, each in zip(self.offsets, self.layout, strict=False):
            self.parameters[each.name].register_post_accumulate_grad_hook(self._accumulate_at(offset))  # type: ignore[no-untyped-call]

    def detach_weights(self) -> Tensor:
        """Give the weights away, so that their memory can be freed; there are no parameters until they are back."""
        flat, self.weights, self.parameters = self.weights, None, {}
        assert flat is not None, "weights are already detached"
        return flat

    def clear_gradients(self) -> None:
        """Gradients of zero; takes their memory where it was freed."""
        if self.gradients is None:
            self.gradients = torch.zeros(self.chunk_size * self.group.size, dtype=torch.float32, device=self.device)
        else:
            self.gradients.zero_()

    def reduce_gradients(self) -> Tensor:
        """Sum of this rank's chunk over all replicas, float32 [chunk_size], added in rank order."""
        assert self.gradients is not None, "reduce before clear_gradients"
        one_row_each = [1] * self.group.size
        parts = self.group.all_to_all(self.gradients.view(self.group.size, -1), one_row_each, one_row_each)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather_chunks(self, chunk: Tensor) -> Tensor:
        """The flat tensor in the compute dtype, from every replica's chunk."""
        return torch.cat(self.group.all_gather(chunk.to(self.dtype)))

    def publish(self, masters: Tensor) -> None:
        """Set the weights of all replicas from everyone's fp32 chunk."""
        assert self.weights is not None, "publish while the weights are parked"
        self.weights.copy_(self.gather_chunks(masters))

    def own_spans(self, attribute: str) -> list[slice]:
        """Spans of this rank's chunk whose parameters have the attribute (`counted` or `decayed`) set, adjacent ones joined."""
        spans: list[slice] = []
        start = self.chunk.start
        for offset, each in zip(self.offsets, self.layout, strict=False):
            low, high = max(offset - start, 0), min(offset + each.size - start, self.chunk_size)
            if not getattr(each, attribute) or low >= high:
                continue
            if spans and spans[-1].stop == low:
                low = spans.pop().start
            spans.append(slice(low, high))
        return spans

    def _accumulate_at(self, offset: int) -> object:
        """A hook that adds what backward left into the fp32 gradients: bf16 sums over micro-batches would lose digits."""

        def accumulate(parameter: Tensor) -> None:
            assert self.gradients is not None, "backward before clear_gradients"
            assert parameter.grad is not None, "the hook runs after accumulation"
            self.gradients[offset : offset + parameter.numel()].add_(parameter.grad.reshape(-1))
            parameter.grad = None

        return accumulate


def _offsets(sizes: Sequence[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
