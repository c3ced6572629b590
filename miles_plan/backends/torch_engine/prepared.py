"""Weights rounded to their grids, kept for as long as the weights do not change."""

from __future__ import annotations

import weakref

from torch import Tensor

from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.matmul import prepare_weight


class PreparedWeights:
    """A cache that its owner clears: call `clear` after weights changed (an optimizer step, new weights received).

    In-place changes that autograd counts, and another tensor under the same name, are noticed without it. Row-parallel
    weights are prepared collectively over tp, in the order of the forward, which is the same on all ranks.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def get(self, name: str, weight: Tensor, *, k_full: int | None = None, group: RankGroup | None = None) -> Tensor:
        """`prepare_weight(weight)`, computed once."""
        held = self._held.get(name)
        if held is not None and held[0]() is weight and held[1] == weight._version:
            return held[2]
        ready = prepare_weight(weight, k_full=k_full, group=group)
        self._held[name] = (weakref.ref(weight), weight._version, ready)
        return ready

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(ready.numel() * ready.element_size() for _, _, ready in self._held.values())
