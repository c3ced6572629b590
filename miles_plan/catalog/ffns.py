"""Feed-forward parts of a layer: dense, or a mixture of experts with shared and latent variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFfn:
    """Two projections, or three where the activation is gated (SwiGLU, GeGLU). gelu: the gate is GELU, not SiLU (Gemma)."""

    kind: ClassVar[str] = "dense"
    size: int
    gated: bool = True
    bias: bool = False
    gelu: bool = False

    @property
    def up_width(self) -> int:
        """Output width of the first projection: gate and up together."""
        return self.size * (2 if self.gated else 1)

    def sharded_params(self, hidden: int) -> int:
        """Projections and the first bias, split over tensor-parallel ranks."""
        return hidden * (self.up_width + self.size) + (self.up_width if self.bias else 0)

    def replicated_params(self, hidden: int) -> int:
        """The second bias, whole on every rank."""
        return hidden if self.bias else 0

    def expert_params(self, hidden: int) -> int:
        """No routed experts."""
        return 0

    def active_params(self, hidden: int) -> int:
        """Parameters one token meets: all of them."""
        return self.sharded_params(hidden) + self.replicated_params(hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeFfn:
    """Routed experts with optional shared experts.

    size: width inside one expert; shared_size: all shared experts together; latent_size: experts work on a projection
    of the token this wide (Nemotron 3 Super), 0 = on the token; parallel_dense_size: a dense part beside the experts
    (Gemma 4); router_params_extra: biases and scales of the router; gelu: the gate is GELU, not SiLU (Gemma 4).
    """

    kind: ClassVar[str] = "moe"
    experts: int
    topk: int
    size: int
    gated: bool = True
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    latent_size: int = 0
    parallel_dense_size: int = 0
    router_params_extra: int = 0
    gelu: bool = False

    @property
    def up_width(self) -> int:
        """Output width of an expert's first projection: gate and up together."""
        return self.size * (2 if self.gated else 1)

    @property
    def matrices(self) -> int:
        """Weight matrices of one expert, gate and up counted apart."""
        return 3 if self.gated else 2

    def expert_input(self, hidden: int) -> int:
        """Width of what an expert reads and writes."""
        return self.latent_size or hidden

    def one_expert_params(self, hidden: int) -> int:
        """Parameters of one routed expert."""
        into = self.expert_input(hidden)
        return into * self.size * self.matrices + (self.up_width + into if self.bias else 0)

    def expert_params(self, hidden: int) -> int:
        """All routed experts, split by expert parallelism."""
        return self.experts * self.one_expert_params(hidden)

    def sharded_params(self, hidden: int) -> int:
        """Shared experts, split over tensor-parallel ranks."""
        return hidden * (self.shared_size + self.parallel_dense_size) * self.matrices

    def replicated_params(self, hidden: int) -> int:
        """Router, shared gate and latent projections, whole on every rank."""
        gate = hidden if self.shared_gate else 0
        return hidden * self.experts + self.router_params_extra + gate + 2 * hidden * self.latent_size

    def active_params(self, hidden: int) -> int:
        """Parameters one token meets: its experts, the shared ones and the router."""
        routed = self.topk * self.one_expert_params(hidden)
        return routed + self.sharded_params(hidden) + self.replicated_params(hidden)


Ffn = DenseFfn | MoeFfn
FFNS: dict[str, type[Ffn]] = {each.kind: each for each in (DenseFfn, MoeFfn)}
