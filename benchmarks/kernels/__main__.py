"""Time and check the GPU kernels: python -m benchmarks.kernels --out FILE.json [--shapes FILE.json] [--seconds 270]

Without --shapes, the default list: everything, in under five minutes on one H200. Each figure is device time, measured side by
side with its baselines inside one process, inputs rotated past L2, random data (`timing`). Kernels are compiled first, in
parallel, so that no compilation is timed. Exits with 1 if a shape failed or its bits depended on the batch.
"""

from __future__ import annotations

import os

# Before torch is loaded: cuBLASLt without workspace, the second baseline of every product.
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "1")
os.environ.setdefault("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "0")

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from miles_plan.kernels.cuda.toolchain import triton

from .attentions import measure_attention
from .gemms import measure_fp8, measure_fp8_grouped, measure_gradients, measure_grouped, measure_matmul
from .layer import measure_layer
from .record import Record
from .rowwise import copy_gb_per_s, measure_log_prob, measure_rms_norm
from .shapes import Shape, default_shapes, read_shapes
from .summary import summarise

MEASURES: dict[str, Callable[[Shape], Record]] = {
    "matmul": measure_matmul,
    "matmul_gradients": measure_gradients,
    "grouped_matmul": measure_grouped,
    "fp8_matmul": measure_fp8,
    "fp8_grouped_matmul": measure_fp8_grouped,
    "attention": measure_attention,
    "log_prob": measure_log_prob,
    "rms_norm": measure_rms_norm,
    "decoder_layer": measure_layer,
}
MOST_WORKERS = 14


def measure(shape: Shape) -> Record:
    """One shape; an error becomes part of its record, so that one shape cannot stop the rest."""
    try:
        record = MEASURES[shape.op](shape)
    except (RuntimeError, ValueError, triton.TritonError) as error:
        record = Record(shape, failure=f"{type(error).__name__}: {error}"[:500])
    torch.cuda.empty_cache()
    return record


def line(record: Record) -> str:
    """One row of the table."""
    if record.failure:
        return f"{record.shape!s:70s} FAILED {record.failure[:200]}"
    times = " ".join(f"{name} {us:.1f}" for name, us in record.us.items())
    ratio = f"x{record.ratio:.3f}" if record.ratio is not None else ""
    rate = f"{record.gb_per_s:.0f} GB/s" if record.gb_per_s is not None else ""
    bits = "" if record.same_bits is None else "bits equal" if record.same_bits else "BITS DIFFER"
    return f"{record.shape!s:70s} {ratio:7s} {rate:10s} {bits} | {times}"


def compile_in_parallel(arguments: Sequence[str], shapes: int, wait_s: float) -> None:
    """Fill Triton's cache: workers that each run their share of the shapes once, without timing."""
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2, shapes))
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    running = [
        subprocess.Popen([*command, "--compile-share", f"{i}/{workers}"], stdout=subprocess.DEVNULL) for i in range(workers)
    ]
    end = time.monotonic() + wait_s
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # what it had left is compiled when its turn comes
            process.wait()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, help="a JSON list of shapes; see benchmarks/kernels/shapes.py")
    parser.add_argument("--only", nargs="+", choices=sorted(MEASURES), help="only these ops of the list")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--seconds", type=float, default=270.0, help="start no shape after this many seconds")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; the CPU references are checked by tests/kernels/cuda")
    try:
        shapes = read_shapes(options.shapes) if options.shapes else default_shapes()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    shapes = [shape for shape in shapes if not options.only or shape.op in options.only]
    if options.compile_share:
        return compile_share(shapes, options.compile_share)
    compile_in_parallel(_passed_on(options), len(shapes), wait_s=options.seconds / 3)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy = copy_gb_per_s()
    records = []
    for shape in shapes:
        if time.monotonic() - begin > options.seconds:
            print(f"stopped after {options.seconds:.0f} s with {len(shapes) - len(records)} shapes left", flush=True)
            break
        records.append(measure(shape))
        print(line(records[-1]), flush=True)
    summary = summarise(records, copy)
    print("\n" + "\n".join(f"{row['what']:58s} {row['figure']}" for row in summary))
    if options.out:
        write(options.out, records, summary, copy, time.monotonic() - begin, len(shapes))
    return 1 if any(record.failure or record.same_bits is False for record in records) else 0


def _passed_on(options: argparse.Namespace) -> list[str]:
    shapes = ["--shapes", str(options.shapes)] if options.shapes else []
    return shapes + (["--only", *options.only] if options.only else [])


def compile_share(shapes: Sequence[Shape], share: str) -> int:
    """A worker of `compile_in_parallel`: every `of`-th kind of shape from `index`, once each."""
    from .warming import warm

    index, of = (int(part) for part in share.split("/"))
    for shape in list(shapes)[index::of]:
        try:
            warm(shape)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, triton.TritonError):  # reported when the shape is measured
            continue
        torch.cuda.empty_cache()
    return 0


def write(
    path: Path, records: Sequence[Record], summary: list[dict[str, Any]], copy: float, seconds: float, wanted: int
) -> None:
    """The results with what they were measured on."""
    device = torch.cuda.get_device_properties(0)
    about = {
        **machine(), "gpu": device.name, "gpu_memory_gib": round(device.total_memory / 2**30), "cuda": torch.version.cuda,
        "torch": torch.__version__, "copy_gb_per_s": round(copy), "seconds": round(seconds), "shapes": wanted,
        "measured": len(records),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(f"  {json.dumps(record.to_dict())}" for record in records)
    path.write_text(
        f'{{"machine": {json.dumps(about)},\n"summary": {json.dumps(summary, indent=1)},\n"records": [\n{body}\n]}}\n'
    )


if __name__ == "__main__":
    sys.exit(main())
