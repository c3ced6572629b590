"""`train:` the trainer: its engine, layout, memory choices and optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.section import Section
from miles_plan.spec.types import (
    AutoOr,
    Count,
    CountOrZero,
    Fraction,
    LearningRate,
    LearningRateOrZero,
    Momentum,
    Size,
)


class TrainLayoutSpec(Section):
    """Parallel sizes of the trainer, as Megatron-core names them; `miles_plan.ir.layout.TrainLayout` is the planned form."""

    dp: AutoOr[Size] = "auto"
    """Data parallel replicas; `auto` uses all GPUs that the other sizes leave."""
    tp: Size = 1
    """Tensor parallel ranks."""
    pp: Size = 1
    """Pipeline stages."""
    vpp: Size = 1
    """Model chunks per pipeline stage; 1 is not interleaved."""
    cp: Size = 1
    """Context parallel ranks."""
    ep: Size = 1
    """Expert parallel ranks."""
    etp: Size = 1
    """Tensor parallel ranks inside an expert."""
    sequence_parallel: AutoOr[bool] = "auto"
    """Split activations along the sequence over the tensor parallel ranks; `auto` is on when tp > 1."""
    stage_layers: Annotated[tuple[CountOrZero, ...], Field(strict=False, max_length=4096)] = ()
    """Layers of each of the pp x vpp chunks, in model order; empty is even."""


class OptimizerFields(Section):
    """AdamW with fp32 master weights (arXiv 1711.05101) and its learning rate schedule."""

    lr: LearningRate = 1e-6
    """Learning rate after warm-up."""
    beta1: Momentum = 0.9
    """Decay of the first moment."""
    beta2: Momentum = 0.95
    """Decay of the second moment."""
    epsilon: Fraction = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay."""
    clip_grad_norm: Annotated[float, Field(ge=0, le=1_000_000)] = 1.0
    """Largest global gradient norm; 0 is off."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    min_lr: LearningRateOrZero = 0.0
    """Where the linear and cosine schedules end."""


class OptimizerSpec(OptimizerFields):
    """The trainer's optimizer and where its state lives."""

    kind: Literal["adam"] = "adam"
    """The optimizer."""
    offload: Literal["auto", "off", "host"] = "auto"
    """Keep optimizer state in host memory; `auto` lets the memory plan decide."""
    offload_fraction: Fraction = 1.0
    """Share of the state that goes to the host where any does (Megatron's `--optimizer-offload-fraction`)."""
    precision_aware: bool = False
    """The update reads bf16 gradients as they are, without an fp32 copy (Megatron's precision-aware optimizer)."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Number format of both moments; bf16 needs `precision_aware`."""


class TrainSpec(Section):
    """The trainer."""

    engine: Literal["megatron", "fsdp2", "torch"] = "megatron"
    """megatron: Megatron-core; fsdp2: PyTorch FSDP2; torch: the embedded engine, on CPU or one GPU a rank."""
    layout: AutoOr[TrainLayoutSpec] = "auto"
    """Parallel sizes; `auto` searches."""
    tokens_per_gpu: AutoOr[Count] = "auto"
    """Token budget of a micro-batch on one GPU; `auto` follows from the memory plan."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """Activations recomputed in the backward pass; `auto` is the cheapest that fits."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Number format that gradients add up and travel in."""
    release: Literal["auto", "26.02", "26.04", "26.06"] = "auto"
    """NVIDIA NeMo container whose Megatron-core the trainer runs, which decides what CUDA graphs and fused experts save;
    `auto` is Megatron-core 0.19 without either."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """The optimizer."""
