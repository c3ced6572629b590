"""What a Megatron trainer is built from: plain data that an actor can be started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from miles_plan.ir.layout import Recompute, TrainLayout

LayerSpec = Literal["transformer_engine", "local", "batch_invariant"]
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe")  # Megatron-core's names


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronEngineOptions:
    """One rank of a Megatron trainer.

    model_directory: a Hugging Face checkpoint, config.json and safetensors; host_directory: where a CPU engine parks offloaded
    parts (a GPU engine uses pinned memory); dtype: of the forward and backward, masters are float32; micro_batch_tokens: most
    packed tokens of one micro-batch, over its context-parallel ranks; recompute: "selective" recomputes recompute_modules in
    the backward, "full" whole layers; fp8: Transformer Engine's blockwise FP8 in the linear layers; layer_spec: whose layers,
    "auto" is Transformer Engine on a GPU and Megatron's local torch layers elsewhere; optimizer_offload: masters and moments
    are on the device only while they are updated; reference_offload: the reference and the teacher only while they score;
    deterministic: only kernels that give the same bits every time.
    """

    model_directory: Path
    host_directory: Path
    layout: TrainLayout = field(default_factory=TrainLayout)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    micro_batch_tokens: int = 8192
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    fp8: bool = False
    layer_spec: LayerSpec | Literal["auto"] = "auto"
    keep_reference: bool = False
    reference_offload: bool = False
    teacher_directory: Path | None = None
    optimizer_offload: bool = False
    device: Literal["cpu", "cuda"] = "cuda"
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for what cannot be."""
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        if unknown := set(self.recompute_modules) - set(RECOMPUTE_MODULES):
            raise ValueError(f"recompute_modules {sorted(unknown)} are not among {', '.join(RECOMPUTE_MODULES)}")
        if self.fp8 and self.layers != "transformer_engine":
            raise ValueError("fp8 needs layer_spec='transformer_engine'")

    @property
    def layers(self) -> LayerSpec:
        """Whose layers the model is made of."""
        if self.layer_spec != "auto":
            return self.layer_spec
        return "transformer_engine" if self.device == "cuda" else "local"
