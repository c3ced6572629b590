"""Engines as the actors hold them: which factory makes which engine, and the little the executor keeps beside each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_plan.backends.engine import EngineError, RolloutEngine, TrainEngine


@dataclass
class TrainRank:
    """One rank of a trainer. version: training steps behind its weights, so that no export carries a wrong label."""

    engine: TrainEngine
    rank: int
    version: int = 0
    senders: dict[str, Any] = field(default_factory=dict)  # process groups to rollout engines, by name

    @property
    def start_s(self) -> Mapping[str, float]:
        """What its start was made of, in seconds, where the engine says so."""
        return getattr(self.engine, "start_s", {})

    def at(self, version: int) -> TrainEngine:
        """The engine, sure to hold that version. EngineError if the driver and this rank disagree."""
        if self.version != version:
            raise EngineError(f"trainer rank {self.rank} holds weights version {self.version}, version {version} was asked for")
        return self.engine

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


@dataclass
class RolloutRank:
    """One rank of one of several rollout engines. version: that it serves; None until a sync was acknowledged."""

    engine: RolloutEngine
    index: int  # of the engine among those of the group
    engines: int
    rank: int  # within the engine
    version: int | None = None

    @property
    def start_s(self) -> Mapping[str, float]:
        """What its start was made of, in seconds, where the engine says so."""
        return getattr(self.engine, "start_s", {})

    def serving(self, version: int) -> RolloutEngine:
        """The engine, sure to serve that version. EngineError if no sync delivered it."""
        if self.version != version:
            raise EngineError(
                f"rollout engine {self.index} serves weights version {self.version}, version {version} was asked for"
            )
        return self.engine

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()
