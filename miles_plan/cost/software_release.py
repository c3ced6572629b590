"""What the trainer's software release changes of a step: the share of launches that graphs replay, and fused experts.

Releases are NVIDIA's NeMo containers (year.month), whose Megatron-core and Transformer Engine brought graphs of parts of layers
with experts in 26.04 (earlier on Grace hosts), of whole ones in 26.06, and in 26.06 grouped products that permute and quantise
routed tokens themselves. Read from the published throughput of the same recipes under three releases (docs/accuracy.md).
SGLang's releases of 2025 and 2026 decode alike: by release, estimates are off by less than a tenth either way.
"""

from __future__ import annotations

from typing import Literal

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.layer_time import ComputeOptions

Release = Literal["auto", "26.02", "26.04", "26.06"]
PARTLY_GRAPHED, EARLY_GRAPHS = 0.7, 0.3


def graphed_share(release: str, model: ModelArchitecture, gpu: Gpu) -> float:
    """Share of a layer's launches that graphs replay; a release that is not known counts as 26.04."""
    if model.moe is None or release >= "26.06":
        return 1.0
    return PARTLY_GRAPHED if release >= "26.04" or not release or gpu.nvlink_domain > 8 else EARLY_GRAPHS


def fuses_experts(release: str, model: ModelArchitecture, gpu: Gpu) -> bool:
    """Whether grouped products permute and quantise routed tokens: gated experts without biases, in one NVLink domain."""
    plain = model.moe is not None and model.moe.gated and not model.moe.bias
    return plain and gpu.nvlink_domain > 8 and release >= "26.06"


def release_compute(release: Release, precision: str, model: ModelArchitecture, gpu: Gpu) -> ComputeOptions:
    """How a layer runs under a release; `auto` is Megatron-core 0.19 as it was measured, without graphs."""
    if release == "auto":
        return ComputeOptions(precision=precision)
    return ComputeOptions(
        precision=precision,
        dispatcher="deepep",
        cuda_graphs=graphed_share(release, model, gpu),
        fused_experts=fuses_experts(release, model, gpu),
    )
