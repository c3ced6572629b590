"""One calibration from start to end: find the GPU, measure, fit, compare with what ships; or diagnostics that say why not."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from miles_plan.calibrate.fit import fit, names_of
from miles_plan.calibrate.gpu_kind import gpu_kind
from miles_plan.calibrate.measure import Grid, machine_of, measure
from miles_plan.calibrate.points import Machine, Measurements
from miles_plan.catalog.gpus import Gpu, gpu_names
from miles_plan.cost.profile import measured_profile_text, profile_for
from miles_plan.diagnostics import PlanError, error

ALONE = "look for other work on the GPU (`nvidia-smi`), then measure again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One constant: as measured, and as the shipped profile has it (None where that has no such entry)."""

    name: str
    measured: float
    shipped: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured on this machine and fitted to it; text is the profile file's."""

    gpu: Gpu
    machine: Machine
    points: Measurements
    constants: Mapping[str, Any]
    text: str

    def comparisons(self) -> Iterator[Comparison]:
        """Every measured constant beside the shipped profile's."""
        shipped = asdict(profile_for(self.gpu))
        for name in names_of(self.constants):
            yield from _compared(name, _value(self.constants, name), _value(shipped, name))


def calibrate_machine(seconds: float, tell: Callable[[str], None], grid: Grid | None = None) -> Calibration:
    """Measure the first GPU of this machine, and collectives between all of them, in about so many seconds.

    Raises:
        PlanError: there is no GPU (MP450), the catalog lacks it (MP451), or a measurement cannot be right (MP452).
    """
    if not torch.cuda.is_available():
        help = "run this on the GPU machine, and give its profile to `estimate --profile` anywhere"
        why = "torch was built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "torch sees none"
        raise PlanError((error("MP450", f"this machine has no GPU that torch can use: {why}", help=help),))
    device = torch.device("cuda", 0)
    machine = machine_of(device)
    gpu = gpu_kind(machine.device, machine.memory_bytes)
    if gpu is None:
        memory = f"{machine.memory_bytes / 1e9:.0f} GB"
        help = f"its datasheet belongs in the catalog first; known: {', '.join(gpu_names())}"
        raise PlanError((error("MP451", f"the catalog has no GPU like `{machine.device}` with {memory}", help=help),))
    try:
        points = measure(device, seconds, grid or Grid(), tell)
    except torch.OutOfMemoryError:
        free, total = (f"{size / 2**30:.1f} GiB" for size in torch.cuda.mem_get_info(device))
        why = f"the GPU's memory ran out, {free} of {total} are free"
        raise PlanError((error("MP452", f"a measurement cannot be used: {why}", help=ALONE),)) from None
    return fitted(gpu, machine, points)


def fitted(gpu: Gpu, machine: Machine, points: Measurements) -> Calibration:
    """The profile that these points make. PlanError with every measurement that cannot be right."""
    found = fit(gpu, points)
    if found.problems:
        raise PlanError(tuple(error("MP452", f"a measurement cannot be used: {each}", help=ALONE) for each in found.problems))
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    text = measured_profile_text(
        gpu,
        datetime.date.today().isoformat(),
        f"miles-plan calibrate on {max(1, machine.num_gpus)}x {machine.device}, {versions}",
        found.constants,
        asdict(machine),
        points.to_json(),
    )
    return Calibration(gpu=gpu, machine=machine, points=points, constants=found.constants, text=text)


def _value(constants: Mapping[str, Any], name: str) -> Any:
    outer, _, inner = name.partition(".")
    value = constants.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else value


def _compared(name: str, measured: Any, shipped: Any) -> Iterator[Comparison]:
    if isinstance(measured, Mapping):
        for part, value in measured.items():
            yield Comparison(name=f"{name}.{part}", measured=value, shipped=(shipped or {}).get(part))
    else:
        yield Comparison(name=name, measured=measured, shipped=shipped)
