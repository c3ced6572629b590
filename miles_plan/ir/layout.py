"""How an engine spreads a model over its GPUs: training and rollout layouts are different types on purpose.

The names are Megatron-core's and SGLang's. A layout says nothing about which GPUs; that is `group.DeviceGroup`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainLayout:
    """Parallel sizes of a trainer, as Megatron-core defines them.

    tp: tensor parallel; pp: pipeline stages; vpp: model chunks per stage (1 = not interleaved); cp: context parallel;
    dp: data parallel replicas of the dense weights; ep: expert parallel; etp: tensor parallel inside an expert.
    The dense mesh is tp x cp x dp x pp; the expert mesh is etp x ep x edp x pp over the same ranks.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] = ()  # layers of each of pp x vpp chunks in model order; empty = even

    @property
    def world_size(self) -> int:
        """Ranks, one a GPU."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert: what is left of the ranks of a stage after ep and etp."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    def problems(self) -> Iterator[str]:
        """What is wrong with the sizes taken alone, whatever the model and the cluster."""
        for name in ("dp", "tp", "pp", "vpp", "cp", "ep", "etp"):
            if (size := getattr(self, name)) < 1:
                yield f"{name} must be at least 1, got {size}"
                return
        if (self.tp * self.cp * self.dp) % (self.ep * self.etp):
            yield f"ep x etp = {self.ep * self.etp} must divide tp x cp x dp = {self.tp * self.cp * self.dp}"
        if self.vpp > 1 and self.pp == 1:
            yield f"vpp={self.vpp} needs pp > 1"
        if self.stage_layers and len(self.stage_layers) != self.pp * self.vpp:
            yield f"stage_layers names {len(self.stage_layers)} chunks, pp x vpp = {self.pp * self.vpp}"

    def __str__(self) -> str:
        """The sizes above 1, in the order people say them: `tp4 pp2 dp8 ep8`."""
        return _sizes(
            {
                "tp": self.tp,
                "pp": self.pp,
                "vpp": self.vpp,
                "cp": self.cp,
                "dp": self.dp,
                "ep": self.ep,
                "etp": self.etp,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLayout:
    """Parallel sizes of the rollout engines, as SGLang defines them.

    engines: independent engines, each a full copy of the weights; tp: GPUs of one engine (SGLang's tp_size); pp: pipeline
    stages inside one engine; ep: expert parallel inside the engine's tp ranks; dp_attention: attention data-parallel
    ranks inside tp (1 = off).
    """

    engines: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp_attention: int = 1

    @property
    def gpus_per_engine(self) -> int:
        """GPUs one engine holds."""
        return self.tp * self.pp

    @property
    def world_size(self) -> int:
        """GPUs of all engines."""
        return self.engines * self.gpus_per_engine

    def problems(self) -> Iterator[str]:
        """What is wrong with the sizes taken alone, whatever the model and the cluster."""
        for name in ("engines", "tp", "pp", "ep", "dp_attention"):
            if (size := getattr(self, name)) < 1:
                yield f"{name} must be at least 1, got {size}"
                return
        if self.tp % self.ep:
            yield f"ep={self.ep} must divide tp={self.tp}"
        if self.tp % self.dp_attention:
            yield f"dp_attention={self.dp_attention} must divide tp={self.tp}"

    def __str__(self) -> str:
        """The engine count, then the sizes above 1: `4 x tp2`."""
        return f"{self.engines} x {_sizes({'tp': self.tp, 'pp': self.pp, 'ep': self.ep, 'dpa': self.dp_attention})}"


def _sizes(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "tp1"
