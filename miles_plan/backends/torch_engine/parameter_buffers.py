"""Parameters, their gradients and their optimizer state in flat tensors, one buffer per group of replicas.

A parameter is a view into the flat weights, so one collective reduces all gradients, one vector operation updates all weights,
and parking a part on the host moves one tensor. Each replica owns one chunk of the buffer: it alone keeps the fp32 masters and
moments of it (ZeRO stage 1, arXiv 1910.02054; Megatron's distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    weights: [n] in the compute dtype; gradients: float32 [n]; parameters: the views of the weights that autograd sees, by name.
    n is padded to a multiple of the group's size, so that every rank owns an equal chunk.
    """

    def __init__(
        self, layout: Sequence[BufferedParameter], group: RankGroup, *, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        # Alike parameters next to each other: a chunk then has few spans that are counted or decayed.
        self.layout = sorted(layout, key=lambda each: (each.counted, each.decayed))
        self.group = group
        sizes = [each.size for each in self.layout]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.chunk_size = -(-sum(sizes) // group.size)
        self.chunk = slice(group.rank * self.chunk_size, (group.rank + 1) * self.chunk_size)
        self.weights = torch.zeros(self.chunk_size * group.size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        self.parameters = {name: view.detach().requires_grad_() for name, view in self.views(self.weights).items()}
        for start, parameter in zip(self._starts, self.parameters.values(), strict=True):
            parameter.register_post_accumulate_grad_hook(self._accumulate_from(start))  # type: ignore[no-untyped-call]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's place in a flat tensor, in its shape."""
        return {
            each.name: flat[start : start + each.size].view(each.shape)
            for start, each in zip(self._starts, self.layout, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A flat float32 tensor from one tensor for each parameter, zero in the padding."""
        flat = torch.zeros_like(self.weights, dtype=torch.float32)
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])
        return flat

    def reduce_gradients(self) -> Tensor:
        """Sum of this rank's chunk over all replicas, float32 [chunk_size], added in rank order."""
        one_row_each = [1] * self.group.size
        parts = self.group.all_to_all(self.gradients.view(self.group.size, -1), one_row_each, one_row_each)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather_chunks(self, chunk: Tensor) -> Tensor:
        """The flat tensor in the compute dtype, from every replica's chunk."""
        return torch.cat(self.group.all_gather(chunk.to(self.weights.dtype)))

    def own_spans(self, attribute: str) -> list[slice]:
        """Spans of this rank's chunk whose parameters have the attribute (`counted` or `decayed`) set, adjacent ones joined."""
        spans: list[slice] = []
        for start, each in zip(self._starts, self.layout, strict=True):
            low = max(start - self.chunk.start, 0)
            high = min(start + each.size - self.chunk.start, self.chunk_size)
            if not getattr(each, attribute) or low >= high:
                continue
            if spans and spans[-1].stop == low:
                low = spans.pop().start
            spans.append(slice(low, high))
        return spans

    def _accumulate_from(self, start: int) -> Callable[[Tensor], None]:
        """A hook that adds what backward left into the fp32 gradients: bf16 sums over micro-batches would lose digits."""

        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None, "the hook runs after accumulation"
            self.gradients[start : start + parameter.numel()].add_(parameter.grad.reshape(-1))
            parameter.grad = None

        return accumulate
