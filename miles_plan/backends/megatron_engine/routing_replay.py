"""Rollout routing replay (R3): routers take the experts that the rollout recorded, and count where they would have differed.

Stands in for megatron.core.transformer.moe.router_replay.RouterReplay, whose one target for all calls cannot serve a pipeline:
here every micro-batch keeps its own record until its layers have been recomputed in the backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ChooseExperts = Callable[..., tuple[Tensor, Tensor]]


@dataclass(slots=True, eq=False)
class RoutingReplay:
    """What the routers of one rank's model are told.

    counted: bool [m], tokens that are no padding; targets: int64 [m, layers, k] by router, or None to let routers choose.
    mismatches, compared: (token, layer) pairs since `reset`.
    """

    _counts: list[Tensor] = field(default_factory=list)  # on the device: counting waits for no layer
    _routers: list[_ReplayedRouter] = field(default_factory=list)
    _running: bool = False

    def attach(self, routers: Iterable[tuple[int, Any]]) -> None:
        """Take charge of routers, each with its column in a routing record."""
        for column, router in routers:
            replayed = _ReplayedRouter(self, column)
            router.router_replay = replayed
            self._routers.append(replayed)

    @property
    def mismatches(self) -> int:
        """Pairs where the router would have chosen others."""
        return int(torch.stack(self._counts).sum(dim=0)[0]) if self._counts else 0

    @property
    def compared(self) -> int:
        """Pairs looked at."""
        return int(torch.stack(self._counts).sum(dim=0)[1]) if self._counts else 0

    def reset(self) -> None:
        """Forget the counts and whatever was not recomputed."""
        self._counts.clear()
        for router in self._routers:
            router.waiting.clear()

    def begin(self, targets: Tensor | None, counted: Tensor, columns: Sequence[int]) -> None:
        """A micro-batch's forward begins on the routers of these columns. Without targets they choose for themselves."""
        self._running = True
        for router in self._routers:
            if router.column in columns:
                router.current = None if targets is None else (targets[:, router.column], counted)
                router.waiting.append(router.current)

    def end(self) -> None:
        """The forward is over: what routers are asked from now on is recomputation."""
        self._running = False


@dataclass(slots=True, eq=False)
class _ReplayedRouter:
    """One layer's. waiting: records of micro-batches that were run forward, in the order in which backwards will come."""

    owner: RoutingReplay
    column: int
    current: tuple[Tensor, Tensor] | None = None
    waiting: deque[tuple[Tensor, Tensor] | None] = field(default_factory=deque)
    layer_number: int | None = None

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: ChooseExperts
    ) -> tuple[Tensor, Tensor]:
        """Called by Megatron's router with the scores [m, experts]: values and indices [m, k] of the experts to use."""
        forward = self.owner._running
        target = self.current if forward else self.waiting.popleft()
        if target is None:
            return choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        experts, counted = target
        if forward:
            with torch.no_grad():
                _, own = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
                differs = (own.sort(dim=1).values != experts.sort(dim=1).values).any(dim=1)
                self.owner._counts.append(torch.stack([(differs & counted).sum(), counted.sum()]))
        return scores.gather(1, experts), experts
