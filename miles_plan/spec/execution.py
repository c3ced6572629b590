"""Where, when and in which precision the parts run: `placement`, `schedule`, `precision`, `weight_sync`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.section import Section
from miles_plan.spec.types import AutoOr, Count, Size, WordOr

TrainDtype = Literal["bf16", "fp32", "fp8_blockwise", "mxfp8", "nvfp4", "int4_qat"]
RolloutDtype = Literal["bf16", "fp32", "fp8_blockwise", "mxfp8", "nvfp4", "int4"]
KvCacheDtype = Literal["auto", "bf16", "fp32", "fp8"]


class SplitPlacement(Section):
    """Rollout engines and trainer on GPUs of their own, in a given proportion."""

    rollout_gpus: Size
    """GPUs of the rollout engines; the trainer has the rest."""


Placement = WordOr[Literal["auto", "colocate", "disaggregate"], SplitPlacement]


class ScheduleSpec(Section):
    """How rollout and training overlap."""

    mode: Literal["auto", "synchronous", "one_step_off", "asynchronous"] = "auto"
    """synchronous: one waits for the other; one_step_off: train on the previous rollout while the next is generated;
    asynchronous: generate all the time, within `max_staleness`. `auto` is synchronous."""
    max_staleness: AutoOr[Annotated[int, Field(ge=0, le=1_000)]] = "auto"
    """Weight versions a sample may be behind when it is trained on; `auto` is 0, 1 or 2 by mode."""


class PrecisionSpec(Section):
    """Number formats of both sides, and what is done about their difference."""

    train: TrainDtype = "bf16"
    """Format of the trainer's matrix products; master weights are fp32."""
    rollout: RolloutDtype = "bf16"
    """Format of the engines' matrix products."""
    kv_cache: KvCacheDtype = "auto"
    """Format of the KV cache; `auto` follows `rollout`."""
    alignment: Literal["auto", "exact", "replay", "corrected", "off"] = "auto"
    """exact: equal log-probs bit for bit; replay: routing replayed, the rest accepted; corrected: importance weights;
    off: differences accepted. `auto` is the strictest that the engines can do."""
    correction: Literal["tis", "mis"] = "tis"
    """Truncated importance sampling, or masked (samples outside the bound are left out)."""
    correction_clip: Annotated[float, Field(gt=1, le=1_000)] = 2.0
    """Bound of the importance weight."""
    max_log_prob_diff: AutoOr[Annotated[float, Field(ge=0, le=100)]] = "auto"
    """The run stops when a token's |rollout - trainer| log-prob exceeds it; `auto` is 0 when exact."""


class WeightSyncSpec(Section):
    """How new weights reach the rollout engines."""

    transport: Literal["auto", "shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta"] = "auto"
    """The transport; `auto` is the cheapest that the placement allows."""
    bucket_mib: AutoOr[Count] = "auto"
    """Size of a transfer bucket in MiB."""
