"""What the embedded engines are built from: plain data that an actor can be started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from miles_plan.ir.layout import RolloutLayout, TrainLayout

DtypeName = Literal["float32", "bfloat16"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainEngineOptions:
    """One rank of the embedded trainer.

    model_directory: a Hugging Face checkpoint, config.json and safetensors; dtype: of the forward and backward, masters are
    float32; micro_batch_tokens: most packed tokens of one forward and backward; recompute: activations recomputed in the
    backward ("selective" the attention block, "full" whole layers); keep_reference: hold a frozen copy of the initial
    weights; host_directory: where offloaded parts are parked as files (CPU); teacher_directory: the checkpoint behind
    `model="teacher"`, or None; draft: hold a speculative draft, drawn from `seed`, and train it with `draft_step`.
    """

    model_directory: Path
    host_directory: Path
    layout: TrainLayout = field(default_factory=TrainLayout)
    dtype: DtypeName = "float32"
    micro_batch_tokens: int = 8192
    recompute: Recompute = "none"
    keep_reference: bool = False
    teacher_directory: Path | None = None
    draft: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a size that cannot be."""
        _at_least_one(micro_batch_tokens=self.micro_batch_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutEngineOptions:
    """One rank of one embedded rollout engine.

    model_directory: a Hugging Face checkpoint, served as version 0; kv_pool_tokens: tokens the paged KV cache holds, a
    multiple of page_tokens; max_running: most samples decoded together; prefill_chunk_tokens: most prompt tokens fed in one
    step; prefix_sharing: samples of one prompt share its KV pages; return_routing: record the experts of every token;
    """

    model_directory: Path
    layout: RolloutLayout = field(default_factory=RolloutLayout)
    dtype: DtypeName = "float32"
    kv_pool_tokens: int = 65536
    page_tokens: int = 16
    max_running: int = 256
    prefill_chunk_tokens: int = 2048
    prefix_sharing: bool = True
    return_routing: bool = False
    max_context_tokens: int = 0
    draft_steps: int = 0
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a size that cannot be."""
        _at_least_one(
            kv_pool_tokens=self.kv_pool_tokens,
            page_tokens=self.page_tokens,
            max_running=self.max_running,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
        )
        if self.kv_pool_tokens % self.page_tokens:
            raise ValueError(f"kv_pool_tokens={self.kv_pool_tokens} must be a multiple of page_tokens={self.page_tokens}")
        for name in ("max_context_tokens", "draft_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
