"""What an FSDP2 trainer is built from: plain data that an actor can be started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from miles_plan.ir.layout import Recompute, TrainLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpEngineOptions:
    """One rank of an FSDP2 trainer.

    model_directory: a Hugging Face checkpoint, config.json and safetensors; host_directory: where a CPU engine parks offloaded
    parts (a GPU engine uses pinned memory); layout: data parallel only, every rank holds a share of every tensor; dtype: of the
    forward and backward, masters are float32; micro_batch_tokens: most packed tokens of one micro-batch; recompute: "selective"
    recomputes attention blocks in the backward, "full" whole layers; optimizer_offload: moments are on the device only while
    they are updated; reference_offload: the reference and the teacher only while they score.
    """

    model_directory: Path
    host_directory: Path
    layout: TrainLayout = field(default_factory=TrainLayout)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    micro_batch_tokens: int = 8192
    recompute: Recompute = "none"
    keep_reference: bool = False
    reference_offload: bool = False
    teacher_directory: Path | None = None
    optimizer_offload: bool = False
    device: Literal["cpu", "cuda"] = "cuda"
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for what cannot be."""
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be at least 1, got {self.micro_batch_tokens}")
        if problems := list(layout_problems(self.layout)):
            raise ValueError("the FSDP2 trainer cannot take this layout: " + "; ".join(problems))


def layout_problems(layout: TrainLayout) -> list[str]:
    """The sizes that are not 1 and would have to be; everything but dp."""
    found = list(layout.problems())
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    return found + [f"{name}={size} (allowed: 1; it shards over dp)" for name, size in sizes.items() if size > 1]
