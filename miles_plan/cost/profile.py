"""Hardware profiles as JSON files: the shipped ones, a user's own over them, and which one prices a GPU.

A profile holds fractions of datasheet peaks and a few latencies, so one measured on an H200 carries over to its
relatives; `profile_for` picks the nearest and says so in `basis`. A user's file, which `miles-plan calibrate` writes, may hold
any part of the constants: the rest is the shipped profile's of that GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from miles_plan.catalog.gpus import Gpu, find_gpu
from miles_plan.catalog.hardware_profile import HardwareProfile, MeasuredHere, OpCost

__all__ = [
    "HardwareProfile",
    "OpCost",
    "default_profile",
    "load_profile",
    "measured_profile_text",
    "profile_for",
    "profile_text",
    "relative_error",
    "save_profile",
    "shipped_constants",
]

SCHEMA = 1
EVIDENCE = ("machine", "points")
"""Keys of a profile file that say how its constants were found; estimates do not read them."""
LARGEST_FILE_BYTES = 16 << 20

_LABELS = ("gpu", "basis", "date", "source")
_CONSTANTS = tuple(each.name for each in fields(HardwareProfile) if each.name not in (*_LABELS, "here"))
_MAY_BE_ZERO = ("floor_s", "nvlink_latency_s", "rdma_latency_s", "kernel_launch_s", "ipc_open_s", "host_scale")


def load_profile(path: Path, gpu: Gpu | None = None) -> HardwareProfile:
    """A user's profile file over the shipped profile of its GPU, which `gpu` must be where it is given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no profile, of another schema, of another GPU, or holds a value that no machine gives.
    """
    with path.open("rb") as file:
        raw = file.read(LARGEST_FILE_BYTES + 1)
    if len(raw) > LARGEST_FILE_BYTES:
        raise ValueError(f"{path} is larger than {LARGEST_FILE_BYTES >> 20} MiB, so it is no hardware profile")
    data = _read(raw.decode("utf-8"), str(path))
    try:
        kind = find_gpu(str(data.get("gpu", "")))
    except ValueError as unknown:
        raise ValueError(f"{path}: {unknown}") from None
    if gpu is not None and kind.name != gpu.name:
        raise ValueError(f"{path} is a profile of {kind.name}, the cluster has {gpu.name}")
    shipped = profile_for(replace(kind, profile=None))
    own = {name: value for name, value in data.items() if name in _CONSTANTS}
    if not own:
        raise ValueError(f"{path} holds no constant of a hardware profile")
    below = _as_json(shipped)
    for name, value in own.items():
        _check(name, value, below[name], str(path))
    here = MeasuredHere(
        file=str(path),
        sha256=hashlib.sha256(raw).hexdigest(),
        constants=tuple(_leaf_names(own)),
        shipped=shipped.gpu,
        shipped_basis=shipped.basis,
    )
    labels = {"gpu": kind.name, "basis": "measured", "date": str(data.get("date", "")), "source": str(data.get("source", ""))}
    return replace(_profile(below | labels | _merged(below, own), str(path)), here=here)


def profile_text(profile: HardwareProfile) -> str:
    """The JSON text of a whole profile."""
    return _text(_as_json(profile))


def measured_profile_text(
    gpu: Gpu, date: str, source: str, constants: Mapping[str, Any], machine: Mapping[str, Any], points: Mapping[str, Any]
) -> str:
    """The JSON text of what was measured on a user's machine: the constants, and the points they were fitted to."""
    labels = {"gpu": gpu.name, "basis": "measured", "date": date, "source": source}
    return _text({**labels, **constants, "machine": dict(machine), "points": dict(points)})


def save_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a whole profile to a file."""
    path.write_text(profile_text(profile), encoding="utf-8")


def default_profile() -> HardwareProfile:
    """The shipped H200 profile."""
    return _packaged("h200")


_NEAREST = {
    "h800": "h100",
    "h20": "h200",
    "gh200": "h200",
    "gb10": "b200",
    "mi300x": "h200",
    "mi325x": "h200",
    "mi350x": "b200",
    "mi355x": "b200",
    "cpu": "h200",
}
"""GPUs without a profile of their own, and whose fractions they borrow."""


def profile_for(gpu: Gpu) -> HardwareProfile:
    """The profile measured for this GPU if it carries one, the shipped one, or the nearest one's fractions on its
    datasheet, marked as a roofline."""
    if gpu.profile is not None:
        return gpu.profile
    nearest = _NEAREST.get(gpu.name)
    if nearest is None:
        return _packaged(gpu.name if gpu.name in _SHIPPED else "h200")
    base = _packaged(nearest)
    source = f"fractions of {base.gpu} ({base.source}) on the datasheet of {gpu.name}"
    own = {"host_to_device_bytes_per_s": gpu.pcie_bytes_per_s, "device_to_host_bytes_per_s": gpu.pcie_bytes_per_s}
    changes: dict[str, Any] = _CPU if gpu.name == "cpu" else {}
    return replace(base, gpu=gpu.name, basis="roofline", source=source, kernel_launch_s=gpu.launch_s, **own | changes)


def relative_error(errors: Mapping[str, float], profile: HardwareProfile, constants: Iterable[str]) -> float:
    """Half width of a figure's interval: `errors` by basis, for a figure that these constants of the profile decide.

    Measuring one's own machine removes what machines of a kind differ by and what a borrowed fraction misses, not what the
    models leave out. So where all the constants were measured, the interval is that of measured or of the shipped
    profile's basis, whichever is narrower; where one was not, it stays that of the shipped profile.
    """
    widest = max(errors.values())
    if profile.here is None:
        return errors.get(profile.basis, widest)
    shipped = errors.get(profile.here.shipped_basis, widest)
    return min(shipped, errors.get("measured", widest)) if profile.here.covers(constants) else shipped


def shipped_constants(profile: HardwareProfile) -> tuple[str, ...]:
    """Dotted names of the constants of a user's profile that are the shipped profile's."""
    if profile.here is None:
        return ()
    every = _leaf_names({name: value for name, value in _as_json(profile).items() if name in _CONSTANTS})
    return tuple(name for name in every if name not in profile.here.constants)


_SHIPPED = frozenset({"a100", "h100", "h100-500w", "h200", "b200", "b300", "gb200", "gb300"})
_CPU: dict[str, Any] = {
    "gemm_fraction": {"fp32": 0.6, "bf16": 0.4, "fp16": 0.4},
    "grouped_gemm_fraction": 0.5,
    "attention_forward_fraction": 0.3,
    "attention_backward_fraction": 0.3,
    "context_bytes": 0.0,
    "communicator_bytes": 0.0,
    "next_communicator_bytes": 0.0,
    "nvlink_latency_s": 2.0e-4,
}


@lru_cache(maxsize=16)
def _packaged(name: str) -> HardwareProfile:
    source = files("miles_plan.cost").joinpath("profiles", f"{name}.json")
    data = _read(source.read_text(encoding="utf-8"), name)
    return _profile({key: value for key, value in data.items() if key not in EVIDENCE}, name)


def _read(text: str, place: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as problem:
        raise ValueError(f"{place} is not JSON: {problem}") from None
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{place} is not a hardware profile of schema {SCHEMA}")
    if unknown := sorted(set(data) - {*_LABELS, *_CONSTANTS, *EVIDENCE}):
        raise ValueError(f"{place}: a hardware profile has no {', '.join(unknown)}")
    return data


def _profile(data: Mapping[str, Any], place: str) -> HardwareProfile:
    try:
        ops = {name: OpCost(**cost) for name, cost in data["decode_ops"].items()}
        return HardwareProfile(**{**data, "decode_ops": ops})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def _check(name: str, value: Any, like: Any, place: str) -> None:
    """A value must have the form of the shipped one: the same keys of a mapping or fewer, numbers that a machine can give."""
    if isinstance(like, Mapping):
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"{place}: {name} must be a mapping")
        for key, each in value.items():
            if key not in like:
                raise ValueError(f"{place}: {name} has no {key}, only {', '.join(like)}")
            _check(f"{name}.{key}", each, like[key], place)
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{place}: {name} must be a number of at least 0")
    leaf = name.rpartition(".")[2]
    if value == 0 and leaf not in _MAY_BE_ZERO and not leaf.endswith("_bytes"):
        raise ValueError(f"{place}: {name} must be above 0")
    if "_fraction" in name and value > 2.0:
        raise ValueError(f"{place}: {name} is a fraction of the datasheet's figure, {value:g} is none")


def _merged(below: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """own over below, mappings key by key."""
    return {
        name: {**below[name], **_merged(below[name], value)} if isinstance(value, Mapping) else value
        for name, value in own.items()
    }


def _leaf_names(constants: Mapping[str, Any]) -> list[str]:
    return [
        leaf
        for name, value in constants.items()
        for leaf in ([f"{name}.{key}" for key in value] if isinstance(value, Mapping) else [name])
    ]


def _as_json(profile: HardwareProfile) -> dict[str, Any]:
    data = asdict(profile)
    del data["here"]
    return data


def _text(data: Mapping[str, Any]) -> str:
    """One constant a line, and one point a line: a diff of two profiles reads well."""
    points = data.get("points", {})
    body = json.dumps({"schema": SCHEMA, **{name: value for name, value in data.items() if name != "points"}}, indent=1)
    if not points:
        return body + "\n"
    kinds = ",\n".join(
        f"  {json.dumps(kind)}: [\n" + ",\n".join(f"   {json.dumps(point)}" for point in each) + "\n  ]"
        for kind, each in points.items()
    )
    return f'{body[:-2]},\n "points": {{\n{kinds}\n }}\n}}\n'
