"""Pipeline stages: the order of forward and backward passes on each stage, and the sends between stages.

One forward, one backward (PipeDream-flush, arXiv 2006.09503): stage s of S runs S - s - 1 forwards ahead, then alternates, so
it never holds the activations of more than S - s micro-batches, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup

Pass = tuple[Literal["forward", "backward"], int]
StageForward = Callable[[int, Tensor | None], Tensor]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Pass]:
    """The passes of one stage, in order, each with its micro-batch."""
    ahead = min(stages - stage - 1, micro_batches)
    for index in range(ahead):
        yield "forward", index
    for index in range(micro_batches - ahead):
        yield "forward", index + ahead
        yield "backward", index
    for index in range(micro_batches - ahead, micro_batches):
        yield "backward", index


@dataclass(slots=True)
class StageLinks:
    """Sends to and receives from the neighbouring stages of one pipeline; stage i is rank i of `group`.

    A send does not wait: its tensor is kept until it has left, so that two stages that send to each other cannot block.
    """

    group: RankGroup
    dtype: torch.dtype
    width: int
    device: str = "cpu"
    _in_flight: list[tuple[Any, Tensor]] = field(default_factory=list)

    @property
    def stage(self) -> int:
        """This rank's stage."""
        return self.group.rank

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.group.size

    @property
    def is_first(self) -> bool:
        """This stage embeds tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """This stage computes log-probs."""
        return self.stage == self.stages - 1

    def receive(self, rows: int, *, from_stage: int) -> Tensor:
        """[rows, width] from a neighbour."""
        tensor = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
        return self.group.receive(tensor, from_stage) if rows else tensor

    def send(self, tensor: Tensor, *, to_stage: int) -> None:
        """Send to a neighbour without waiting. Nothing travels for an empty micro-batch."""
        if not len(tensor):
            return
        tensor = tensor.contiguous()
        self._in_flight.append((self.group.start_send(tensor, to_stage), tensor))

    def wait_sent(self) -> None:
        """Return when all sends have left."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()


def run_forward(links: StageLinks, rows: Sequence[int], forward: StageForward) -> list[Tensor]:
    """Forward passes only; what the last stage's `forward` gave for each micro-batch, empty on the others.

    rows: tokens of each micro-batch; forward(index, hidden or None) gives hidden states, on the last stage any result.
    """
    results = []
    for index, count in enumerate(rows):
        hidden = None if links.is_first else links.receive(count, from_stage=links.stage - 1)
        output = forward(index, hidden)
        if links.is_last:
            results.append(output)
        else:
            links.send(output, to_stage=links.stage + 1)
    links.wait_sent()
    return results


def run_forward_backward(links: StageLinks, rows: Sequence[int], forward: StageForward) -> None:
    """Forward and backward of every micro-batch; gradients are added to the parameters'.

    rows: tokens of each micro-batch; forward(index, hidden or None) gives hidden states, on the last stage the scalar loss.
    """
    live: dict[int, tuple[Tensor | None, Tensor]] = {}
    for kind, index in one_forward_one_backward(links.stage, links.stages, len(rows)):
        if kind == "forward":
            hidden = None if links.is_first else links.receive(rows[index], from_stage=links.stage - 1).requires_grad_()
            output = forward(index, hidden)
            if not links.is_last:
                links.send(output.detach(), to_stage=links.stage + 1)
            live[index] = (hidden, output)
        else:
            hidden, output = live.pop(index)
            gradient = None if links.is_last else links.receive(rows[index], from_stage=links.stage + 1)
            torch.autograd.backward(output, gradient)
            if hidden is not None:
                assert hidden.grad is not None, "a stage's output does not depend on its input"
                links.send(hidden.grad, to_stage=links.stage - 1)
    links.wait_sent()
