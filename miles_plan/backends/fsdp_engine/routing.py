"""Rollout routing replay (R3) in a transformers model: routers take the experts that the rollout recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError


class ReplayedRouters:
    """Stands before the routers of one model. mismatches, compared: (token, layer) pairs since `reset`.

    A micro-batch's backward comes before the next one's forward, so a layer that is recomputed still finds its record.
    """

    def __init__(self, routers: Sequence[Any]) -> None:
        """EngineError for a router whose gates are not known to be a softmax over experts."""
        self.compared = 0
        self._mismatches: list[Tensor] = []  # on the device: counting waits for no layer
        self._targets: Tensor | None = None
        self._counting = False
        for column, router in enumerate(routers):
            if not hasattr(router, "norm_topk_prob"):
                raise EngineError(f"fsdp train engine: routing replay does not know the router {type(router).__name__}")
            router.forward = _Replay(self, router, column)

    @property
    def mismatches(self) -> int:
        """Pairs where the router would have chosen others."""
        return int(torch.stack(self._mismatches).sum()) if self._mismatches else 0

    def reset(self) -> None:
        """Forget the counts."""
        self.compared = 0
        self._mismatches.clear()

    def begin(self, targets: Tensor | None) -> None:
        """A micro-batch begins: experts int64 [t, layers, k], or None to let the routers choose."""
        self._targets, self._counting = targets, targets is not None

    def end(self) -> None:
        """Its forward is over: what routers are asked now is recomputation."""
        self._counting = False


class _Replay:
    """One router's forward: hidden states to (logits, gates, experts), as Qwen3MoeTopKRouter gives them."""

    def __init__(self, owner: ReplayedRouters, router: Any, column: int) -> None:
        self._owner, self._router, self._column = owner, router, column
        self._forward = router.forward

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, gates, own = self._forward(hidden)
        owner = self._owner
        if owner._targets is None:
            return logits, gates, own
        experts = owner._targets[:, self._column]
        if owner._counting:
            owner._mismatches.append((own.sort(dim=1).values != experts.sort(dim=1).values).any(dim=1).sum())
            owner.compared += len(experts)
        chosen = torch.softmax(logits, dim=-1, dtype=torch.float).gather(1, experts)
        if self._router.norm_topk_prob:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return logits, chosen.to(logits.dtype), experts
