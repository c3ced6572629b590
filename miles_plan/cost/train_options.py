"""What a training step does, apart from how it is spread: precision, recomputation, optimizer, batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_plan.cost.activations import Module
from miles_plan.ir.layout import Recompute

Engine = Literal["megatron", "fsdp2", "torch"]
TrainPrecision = Literal["bf16", "fp16", "fp32", "fp8", "mxfp8", "nvfp4"]
Layers = Literal["fused", "batch_invariant", "transformers"]
"""Transformer Engine's (or torchtitan's), this package's batch-invariant ones, or transformers' own, one operator at a time."""

QUANTIZED: frozenset[str] = frozenset({"fp8", "mxfp8", "nvfp4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """Bytes the optimizer keeps a parameter: a master copy and its moments.

    distributed: sharded over data parallel ranks. offload_fraction: share of the state that lives in host memory.
    precision_aware: the update reads 16-bit gradients as they are (Megatron's precision-aware optimizer).
    offload_master: the master copy moves with the moments, as it does in that optimizer; Megatron's default keeps it.
    """

    kind: Literal["adam", "sgd", "muon", "none"] = "adam"
    master_bytes: float = 4.0
    moment_bytes: float = 8.0
    distributed: bool = True
    offload_fraction: float = 0.0
    precision_aware: bool = False
    offload_master: bool = True

    @property
    def bytes_per_param(self) -> float:
        """State of one parameter before sharding."""
        if self.kind == "none":
            return 0.0
        moments = {"adam": 1.0, "muon": 0.5, "sgd": 0.0}[self.kind]
        return self.master_bytes + moments * self.moment_bytes

    @property
    def offloaded_bytes_per_param(self) -> float:
        """State of one parameter that lives in host memory, before sharding."""
        kept = 0.0 if self.offload_master or self.kind == "none" else self.master_bytes
        return self.offload_fraction * (self.bytes_per_param - kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainMemoryOptions:
    """One microbatch and what surrounds it.

    tokens_per_gpu: packed tokens of one microbatch on one GPU, after context parallelism cut it (Miles:
    max_tokens_per_gpu). seq_len: longest sequence, which only unfused attention feels. recompute_layers: with full
    recomputation by block, layers a pipeline rank recomputes; 0 = all. recompute_chunk: layers that are recomputed together
    (Megatron's uniform method), of which only the first one's input is kept. moe_imbalance: tokens of the fullest
    expert-parallel rank over the mean. logits_chunk_tokens: head and loss in chunks of that many tokens; 0 = at once.
    scored_tokens: rows that the head of this package's trainers computes, in bf16;
    0 = another trainer's head, which computes every token's row. layers: whose layers run, which says what
    they keep for the backward.
    logits_bytes: bytes an element of the logits holds at the peak; 0 takes what the engine is known to hold. entropy:
    the loss has an entropy term. reference: a frozen copy of the weights for a KL term, resident on the GPU or swapped
    through host memory. trainable_fraction: below 1 for adapters. forward_only: a log-prob pass. primary_fp8: fp8
    weights are the only ones (fp8 parameter gathering). mtp_layers: multi-token-prediction layers that train along.
    merged_outputs: the last stage keeps every microbatch's logits and joins them (torch.distributed.pipelining).
    graphed_modules: what CUDA graphs replay; it keeps its activations in the graphs' private pool. frozen_vision: the
    vision tower does not train. draft_params: of a draft that trains beside the model. offload_shards: FSDP2 keeps its
    shards of everything in host memory (CPUOffloadPolicy). async_tp: FSDP2's tensor parallelism multiplies while it
    gathers, so gathered inputs are not kept.
    """

    engine: Engine = "megatron"
    tokens_per_gpu: int = 8192
    seq_len: int = 8192
    num_microbatches: int = 1
    precision: TrainPrecision = "bf16"
    grad_bytes: float = 4.0
    recompute: Recompute = "none"
    recompute_modules: frozenset[Module] = frozenset({"core_attn"})
    recompute_layers: int = 0
    recompute_chunk: int = 1
    optimizer: OptimizerOptions = OptimizerOptions()
    moe_imbalance: float = 1.0
    logits_chunk_tokens: int = 0
    scored_tokens: float = 0.0
    layers: Layers = "fused"
    logits_bytes: float = 0.0
    entropy: bool = False
    fused_gradient_accumulation: bool = True
    reference: Literal["none", "resident", "swapped"] = "none"
    trainable_fraction: float = 1.0
    forward_only: bool = False
    primary_fp8: bool = False
    mtp_layers: int = 0
    merged_outputs: bool = False
    graphed_modules: frozenset[Module] = frozenset()
    frozen_vision: bool = False
    offload_shards: bool = False
    draft_params: float = 0.0
    async_tp: bool = False

    def __post_init__(self) -> None:
        if self.tokens_per_gpu < 1 or self.seq_len < 1 or self.num_microbatches < 1:
            raise ValueError("tokens_per_gpu, seq_len and num_microbatches must be at least 1")
        if not 0.0 <= self.optimizer.offload_fraction <= 1.0:
            raise ValueError(f"offload_fraction must be between 0 and 1, got {self.optimizer.offload_fraction}")

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation or compute weight outside fp8."""
        return 4 if self.precision == "fp32" else 2
