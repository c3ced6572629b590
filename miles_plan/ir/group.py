"""Which GPUs: device groups over a cluster whose GPUs are numbered node by node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles_plan.ir.layout import RolloutLayout, TrainLayout

Role = Literal["train", "rollout", "host"]
EngineName = Literal["torch", "megatron", "fsdp2", "sglang", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpan:
    """GPUs `first` to `first + count - 1` by global number (node after node, local index within the node)."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """One past the last GPU."""
        return self.first + self.count

    def overlaps(self, other: GpuSpan) -> bool:
        """Whether any GPU is in both."""
        return self.first < other.end and other.first < self.end

    def __str__(self) -> str:
        """`0..7`, or `3` for one GPU."""
        return str(self.first) if self.count == 1 else f"{self.first}..{self.end - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Where tasks run: a span of GPUs with a role, the engine that owns it there, and that engine's layout.

    Groups that share GPUs are colocated: their engines take turns. The host group has no GPUs: its tasks run in plain
    processes beside the driver.
    """

    name: str
    role: Role
    engine: EngineName
    gpus: GpuSpan | None = None
    train_layout: TrainLayout | None = None
    rollout_layout: RolloutLayout | None = None

    @property
    def layout(self) -> TrainLayout | RolloutLayout | None:
        """The layout of this group's engine, None for the host."""
        return self.train_layout or self.rollout_layout

    def shares_gpus_with(self, other: DeviceGroup) -> bool:
        """Whether the two groups are colocated on some GPU."""
        return self.gpus is not None and other.gpus is not None and self.gpus.overlaps(other.gpus)

    def problems(self, num_gpus: int) -> Iterator[str]:
        """What is wrong with the group on a cluster of `num_gpus`."""
        if self.role == "host":
            return
        if self.gpus is None or self.layout is None:
            yield f"group @{self.name} has no GPUs or no layout"
            return
        yield from self.layout.problems()
        if self.layout.world_size != self.gpus.count:
            yield f"group @{self.name}: layout {self.layout} needs {self.layout.world_size} GPUs, it has {self.gpus.count}"
        if self.gpus.first < 0 or self.gpus.end > num_gpus:
            yield f"group @{self.name}: GPUs {self.gpus} are not all in a cluster of {num_gpus}"


def gpus_in_use(groups: tuple[DeviceGroup, ...]) -> int:
    """How many distinct GPUs the groups hold."""
    used: set[int] = set()
    for group in groups:
        if group.gpus is not None:
            used.update(range(group.gpus.first, group.gpus.end))
    return len(used)
