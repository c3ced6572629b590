"""Parameters of a transformers model and the tensors of its checkpoint: the same, except that experts are stored one by one.

transformers 5 holds the experts of a layer in two tensors, `experts.gate_up_proj` [experts, 2 x inner, hidden] and
`experts.down_proj` [experts, hidden, inner]; a checkpoint has gate_proj, up_proj and down_proj of every expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_FUSED = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of a checkpoint inside a parameter: all of it, or rows start .. stop - 1 of one expert."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0

    def of(self, parameter: Tensor, first_expert: int = 0) -> Tensor:
        """Its place in the parameter, of which `parameter` may hold only experts from `first_expert` on."""
        if self.expert is None:
            return parameter
        return parameter[self.expert - first_expert].narrow(0, self.start, self.shape[0])


def stored_parts(name: str, shape: Sequence[int], stored: Mapping[str, tuple[int, ...]]) -> Iterator[StoredPart]:
    """What a parameter is made of. ValueError when the checkpoint has neither it nor its experts."""
    if name in stored or not name.endswith(_FUSED):
        if stored.get(name) != tuple(shape):
            raise ValueError(f"the checkpoint has '{name}' as {stored.get(name)}, the model wants {tuple(shape)}")
        yield StoredPart(name, tuple(shape))
        return
    prefix, _, kind = name.rpartition(".")
    experts, rows, columns = shape
    pieces = {"gate_proj": rows // 2, "up_proj": rows // 2} if kind == "gate_up_proj" else {"down_proj": rows}
    for expert in range(experts):
        start = 0
        for piece, height in pieces.items():
            full = f"{prefix}.{expert}.{piece}.weight"
            if stored.get(full) != (height, columns):
                raise ValueError(f"the checkpoint has '{full}' as {stored.get(full)}, the model wants {(height, columns)}")
            yield StoredPart(full, (height, columns), expert, start)
            start += height
