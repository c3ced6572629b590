"""Peak memory of a trainer, per GPU and per host, term by term.

The model counts what the caching allocator sees in Megatron-core with Transformer Engine, FSDP2, and the embedded torch
engine. It is exact bookkeeping: no term is fitted. Checked against 51 measured runs on H200 (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.cost.columns import Floats, LayoutColumns, group_layouts
from miles_plan.cost.engine_memory import fsdp_terms, megatron_terms, torch_terms
from miles_plan.cost.interval import Interval, Term, around
from miles_plan.cost.profile import HardwareProfile, default_profile
from miles_plan.cost.rank_params import rank_params
from miles_plan.cost.state_memory import host_bytes, step_gradient_bytes, sum_terms
from miles_plan.cost.train_options import TrainMemoryOptions
from miles_plan.ir.layout import TrainLayout

PEAK_ERROR = {"megatron": 0.002, "fsdp2": 0.07, "torch": 0.15}
"""Relative half width of the 90 % interval on allocated bytes by engine: of 78 measured Megatron ranks, of torchtitan's
published peaks, and of the embedded engine (docs/accuracy.md)."""
DEVICE_ERROR = 0.04
"""What the driver reports may exceed the estimate by: fragmentation differs from run to run."""
NATIVE_FRAGMENTATION = 0.15
"""Share of reserved memory that PyTorch's allocator loses in training without expandable segments (mean of the workloads in
GMLake, arXiv 2401.08156; runs of Megatron-Bridge's activation-recompute study ran out that way with room to spare)."""


@dataclass(frozen=True, slots=True)
class MemoryBreakdown:
    """Bytes of the fullest rank.

    terms: what the allocator holds at the peak of the steps, summing to `peak_bytes.mid` unless the capture of CUDA graphs
    held more before; outside_terms: context, communicators, graph pool, fragmentation. static_bytes: what stays between
    steps. device_bytes: what the driver reports at the peak. host_bytes: pinned host memory of one rank.
    """

    stage: int
    terms: tuple[Term, ...]
    outside_terms: tuple[Term, ...]
    static_bytes: float
    peak_bytes: Interval
    device_bytes: Interval
    host_bytes: float

    @property
    def asleep_bytes(self) -> float:
        """What stays when all states are away."""
        return sum(term.value for term in (*self.terms, *self.outside_terms) if term.name in ASLEEP)

    def needed_bytes(self, expandable_segments: bool) -> float:
        """The conservative end: what a GPU must offer for the run not to run out.

        Expandable segments give cached pieces back; the native allocator loses `NATIVE_FRAGMENTATION` of what it reserves.
        """
        allocated = sum(term.value for term in self.terms)
        outside = sum(term.value for term in self.outside_terms if term.name != "fragmentation")
        if expandable_segments:
            return (allocated + outside) * (1.0 + DEVICE_ERROR)
        return allocated / (1.0 - NATIVE_FRAGMENTATION) + outside


@dataclass(frozen=True, slots=True)
class MemoryColumns:
    """The same for n layouts: every array has shape [n], of each layout's fullest stage."""

    stage: NDArray[np.intp]
    static_bytes: Floats
    peak_bytes: Floats
    device_bytes: Floats
    host_bytes: Floats
    terms: dict[str, Floats]


def train_memory(
    model: ModelArchitecture,
    layout: TrainLayout,
    options: TrainMemoryOptions,
    profile: HardwareProfile | None = None,
) -> MemoryBreakdown:
    """Memory of the fullest rank of one layout.

    Raises:
        ValueError: the layout cannot cut the model into its pipeline chunks.
    """
    columns = train_memory_columns(model, [layout], options, profile)
    terms = tuple(Term(name, float(values[0])) for name, values in columns.terms.items() if values[0])
    inside = tuple(term for term in terms if term.name not in OUTSIDE)
    outside = tuple(term for term in terms if term.name in OUTSIDE)
    peak, device = float(columns.peak_bytes[0]), float(columns.device_bytes[0])
    return MemoryBreakdown(
        stage=int(columns.stage[0]),
        terms=inside,
        outside_terms=outside,
        static_bytes=float(columns.static_bytes[0]),
        peak_bytes=around(peak, PEAK_ERROR[options.engine], "calibrated", inside),
        device_bytes=Interval(peak, device, device * (1.0 + DEVICE_ERROR), "calibrated", terms),
        host_bytes=float(columns.host_bytes[0]),
    )


OUTSIDE = frozenset({"cuda context", "libraries", "communicators", "graph pool", "fragmentation"})
ASLEEP = OUTSIDE - {"fragmentation"} | {"weight-gradient scratch", "workspace"}
"""What a trainer keeps on its GPU when all of its states are away."""
STATIC = (
    "parameters",
    "gradients",
    "optimizer",
    "fp8 weights",
    "reference model",
    "weight-gradient scratch",
    "workspace",
    "graph buffers",
    "draft",
    "draft states",
)


def train_memory_columns(
    model: ModelArchitecture,
    layouts: Sequence[TrainLayout],
    options: TrainMemoryOptions,
    profile: HardwareProfile | None = None,
) -> MemoryColumns:
    """Memory of many layouts at once."""
    count = len(layouts)
    out = {name: np.zeros(count) for name in ("stage", "static", "peak", "device", "host")}
    terms: dict[str, Floats] = {}
    for rows, columns in group_layouts(layouts, options.mtp_layers):
        by_stage = stage_terms(model, columns, options, profile or default_profile())
        static = sum_terms({name: by_stage[name] for name in STATIC if name in by_stage})
        allocated = sum_terms(by_stage, exclude=OUTSIDE)
        if "graph pool" in by_stage:  # all graphs are captured before the first replay, their pool then counted
            allocated = np.maximum(allocated, static + by_stage["graph pool"])
        worst = np.argmax(allocated, axis=1)
        pick = (np.arange(len(columns)), worst)
        out["stage"][rows] = worst
        out["peak"][rows] = allocated[pick]
        out["device"][rows] = sum_terms(by_stage)[pick]
        out["static"][rows] = static[pick]
        out["host"][rows] = host_bytes(model, columns, options)[pick]
        for name, values in by_stage.items():
            terms.setdefault(name, np.zeros(count))[rows] = values[pick]
    return MemoryColumns(out["stage"].astype(np.intp), out["static"], out["peak"], out["device"], out["host"], terms)


def stage_terms(
    model: ModelArchitecture, columns: LayoutColumns, options: TrainMemoryOptions, profile: HardwareProfile
) -> dict[str, Floats]:
    """Every term of every pipeline stage at its peak of the step, shape [n, pp]."""
    engines = {"megatron": megatron_terms, "fsdp2": fsdp_terms, "torch": torch_terms}
    terms = engines[options.engine](model, columns, options, profile)
    return _larger_phase(terms, step_gradient_bytes(rank_params(model, columns), columns, options))


def _larger_phase(terms: dict[str, Floats], step_gradients: Floats) -> dict[str, Floats]:
    """The terms of forward and backward, or of the optimizer step where that holds more."""
    passing = {name for name in terms if name not in STATIC and name not in OUTSIDE}
    step_is_larger = step_gradients > sum_terms({name: terms[name] for name in passing})
    out = {name: np.where(step_is_larger & (name in passing), 0.0, values) for name, values in terms.items()}
    return out | {"step gradients": np.where(step_is_larger, step_gradients, 0.0)}
