"""How profiles that `miles-plan calibrate` measured compare with the shipped one, and what they change in plans.

python -m benchmarks.bench_calibrated one.json two.json --out benchmarks/results/calibration_h200.json

Prints a line for each constant (shipped, and each file's ratio to it), then the step time of every shipped job of that GPU
priced with the shipped and with each measured profile. Exits with 1 if a product, attention or bandwidth constant is off by
more than LIMIT: then the shipped profile no longer describes such machines. Without files it calibrates this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from miles_plan.catalog.gpus import Gpu, find_gpu
from miles_plan.cost.profile import load_profile, profile_for
from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job

SPECS = Path(__file__).parent.parent / "specs"
HELD = ("gemm_fraction", "grouped_gemm_fraction", "attention_", "hbm_fraction", "decode_ops", "context_bytes")
"""Constants that machines of a kind agree on; hosts and links differ."""
LIMIT = 0.1


def leaves(constants: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Constants of a profile's JSON by dotted name."""
    for name, value in constants.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        elif isinstance(value, int | float):
            yield f"{above}{name}", float(value)


def own_constants(path: Path) -> dict[str, float]:
    """What a profile file measured."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return dict(leaves({name: value for name, value in data.items() if name not in ("schema", "machine", "points")}))


def shipped_constants(gpu: Gpu) -> dict[str, float]:
    """The shipped profile's constants."""
    from miles_plan.cost.profile import profile_text

    return dict(leaves(json.loads(profile_text(profile_for(gpu)))))


def step_seconds(spec: Path, profile: Path | None) -> float | None:
    """The critical loop's step in the plan of a shipped job, None where it has no such estimate."""
    sets = [] if profile is None else [f"cluster.profile={json.dumps(str(profile.resolve()))}"]
    plan = compile_job(load_job(str(spec), sets)).plan
    found = next((each for each in plan.estimates if each.unit == "s" and "step" in each.name), None)
    return None if found is None else found.mid


def jobs_of(gpu: Gpu) -> list[Path]:
    """Shipped jobs whose cluster has this GPU."""
    return [path for path in sorted(SPECS.glob("*.yaml")) if load_job(str(path), []).spec.cluster.gpu == gpu.name]


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Every constant and every job, shipped and by file."""
    gpu = find_gpu(json.loads(paths[0].read_text(encoding="utf-8"))["gpu"])
    for path in paths:
        load_profile(path, gpu)
    shipped, found = shipped_constants(gpu), {path.stem: own_constants(path) for path in paths}
    names = dict.fromkeys(name for constants in found.values() for name in constants)
    constants = {
        name: {"shipped": shipped[name], **{file: each[name] for file, each in found.items() if name in each}} for name in names
    }
    steps = {
        job.stem: {"shipped": step_seconds(job, None), **{path.stem: step_seconds(job, path) for path in paths}}
        for job in jobs_of(gpu)
    }
    return {"gpu": gpu.name, "constants": constants, "step_s": steps}


def show(table: Mapping[str, Mapping[str, float | None]]) -> None:
    """A line a row: the shipped value, and each file's ratio to it."""
    for name, row in table.items():
        shipped = row["shipped"]
        ratios = (f"{file} x{value / shipped:.3f}" for file, value in row.items() if file != "shipped" and value and shipped)
        print(f"{name:40s} {shipped or 0.0:10.4g}  {'  '.join(ratios)}")


def off(constants: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Constants that machines of a kind should agree on and that a measured profile has otherwise."""
    return [
        name
        for name, row in constants.items()
        if name.startswith(HELD) and any(abs(value / row["shipped"] - 1.0) > LIMIT for value in row.values())
    ]


def calibrated(folder: Path) -> Path:
    """A fresh profile of this machine."""
    from miles_plan.calibrate.calibration import calibrate_machine

    path = folder / "this_machine.json"
    path.write_text(calibrate_machine(60.0, print).text, encoding="utf-8")
    return path


def main() -> int:
    """Compare, print, hold to the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profiles", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = args.profiles or [calibrated(Path(folder))]
        found = compare(paths)
        evidence = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    show(found["constants"])
    show(found["step_s"])
    if args.out:
        record = {"compared_on": machine(), **found, "profiles": evidence}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    wrong = off(found["constants"])
    for name in wrong:
        print(f"{name} is off by more than {LIMIT:.0%}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
