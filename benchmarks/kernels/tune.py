"""Measure the tiles of the matrix kernels: python -m benchmarks.kernels.tune --out TABLE.json [--shapes FILE.json]

For every product of the list and every power of two of rows, the tiles predicted fastest are compared bit for bit with the
portable kernel's result on random data, and the fastest that is equal wins. Point MILES_PLAN_KERNEL_TABLE at the table to use
it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch

from miles_plan.kernels.cuda.device import multiprocessors
from miles_plan.kernels.cuda.gemm import TREE_LEAVES, gemm
from miles_plan.kernels.cuda.grouped_matmul import plan_tiles
from miles_plan.kernels.cuda.tuning import GemmProblem, GemmTile, Table, overlaps_of, predict_s, ranked, tune

from .shapes import Shape, default_shapes, read_shapes
from .timing import Call, copies, time_side_by_side

DEVICE = torch.device("cuda")
# Measured rows, and the table's buckets each stands for: a choice for 8 rows is the choice for 1 (only the mask differs).
BUCKETS = {
    8: (1, 2, 4, 8), 16: (16,), 32: (32,), 64: (64,), 128: (128,), 256: (256,), 512: (512,), 1024: (1024,), 2048: (2048,),
    4096: (4096,), 8192: (8192, 16_384, 32_768, 65_536),
}  # fmt: skip
MOST_WORKERS = 14
MOST_ROWS_OF_SHORT_LAUNCHES = 1024  # only those are compiled in every way of launching


def problems(shapes: Iterable[Shape]) -> list[GemmProblem]:
    """Every bf16 product of the list at every measured number of rows."""
    found: dict[GemmProblem, None] = {}
    for shape in shapes:
        for m in BUCKETS:
            if shape.op == "matmul" and shape["dtype"] == "bfloat16":
                leaves = TREE_LEAVES if shape["order"] == "tree" else 0
                found[GemmProblem(m, shape["N"], shape["K"], leaves=leaves)] = None
            elif shape.op == "grouped_matmul":
                for rows in (m, 8 * m):
                    found[GemmProblem(rows, shape["N"], shape["K"], experts=shape["experts"])] = None
    return list(found)


class Bench:
    """One problem's random operands."""

    def __init__(self, problem: GemmProblem) -> None:
        self.problem = problem
        m, n, k, experts = problem.m, problem.n, problem.k, max(problem.experts, 1)
        count = copies(n * k * experts * problem.dtype.itemsize, 8)
        new = {"device": DEVICE, "dtype": problem.dtype}
        self.weights = [torch.randn(experts * n, k, **new).mul_(k**-0.5) for _ in range(count)]
        self.x = torch.randn(m, k, **new)
        self.out = torch.empty(m, n, device=DEVICE, dtype=problem.out_dtype)
        self.counts = torch.zeros(experts, device=DEVICE, dtype=torch.int32)
        if problem.experts:
            self.counts = torch.bincount(torch.randint(0, experts, (m,), device=DEVICE), minlength=experts).int()

    def run(self, tile: GemmTile, weight: torch.Tensor, out: torch.Tensor) -> None:
        """The product by one tile, the plan of a grouped one included."""
        plan = plan_tiles(self.counts, self.problem.m, tile.height) if self.problem.experts else None
        gemm(
            self.x, weight, out, leaves=self.problem.leaves, experts=self.problem.experts, plan=plan,
            plan_height=tile.height if plan is not None else 0, tile=tile,
        )  # fmt: skip

    def result(self, tile: GemmTile) -> torch.Tensor:
        """A fresh result, for the comparison of bits."""
        out = torch.empty_like(self.out)
        self.run(tile, self.weights[0], out)
        return out

    def reference(self) -> torch.Tensor:
        """The portable kernel's result."""
        out = torch.empty_like(self.out)
        plan = plan_tiles(self.counts, self.problem.m, 64) if self.problem.experts else None
        gemm(
            self.x, self.weights[0], out, leaves=self.problem.leaves, experts=self.problem.experts, plan=plan,
            plan_height=64 if plan is not None else 0, portable=True,
        )  # fmt: skip
        return out

    def times_s(self, tiles: Sequence[GemmTile]) -> dict[GemmTile, float]:
        """Device seconds of each tile, side by side."""
        contenders: dict[str, list[Call]] = {
            str(i): [lambda w=w, tile=tile: self.run(tile, w, self.out) for w in self.weights]  # type: ignore[misc]  # defaults bind the loop's values
            for i, tile in enumerate(tiles)
        }
        times = time_side_by_side(contenders, budget_ms=0.5, rounds=5 if self.problem.m <= 512 else 3)
        return {tile: times[str(i)] * 1e-6 for i, tile in enumerate(tiles)}


def tune_one(problem: GemmProblem, table: Table) -> dict[str, object]:
    """Tune one problem, copy the choice to the buckets it stands for, and say how good the prediction was."""
    bench = Bench(problem)
    sms = multiprocessors(DEVICE)
    times = tune(problem, bench.result, bench.reference(), bench.times_s, sms, table)
    best = table.get(problem)
    assert best is not None
    predicted = min(times, key=lambda tile: predict_s(tile, problem, sms))
    for m in BUCKETS.get(problem.m, (problem.bucket,)):
        table.put(replace(problem, m=m), best)
    return {
        "key": problem.key, "m": problem.m, "best_us": round(times[best] * 1e6, 2), "best": _numbers(best),
        "predicted_over_best": round(times[predicted] / times[best], 3), "unequal": sum(tile not in times for tile in ranked(problem, sms)),
        "times_us": [[*_numbers(tile), round(s * 1e6, 2)] for tile, s in sorted(times.items(), key=lambda p: p[1])],
    }  # fmt: skip


def _numbers(tile: GemmTile) -> list[int]:
    return [int(value) for value in astuple(tile)]


def compile_share(index: int, of: int, found: Sequence[GemmProblem]) -> None:
    """Compile every `of`-th distinct kernel from `index`: run it once on a small problem of its kind."""
    kinds: dict[tuple[object, ...], tuple[GemmProblem, GemmTile]] = {}
    for problem in found:
        for tile in ranked(problem, multiprocessors(DEVICE)):
            for way in overlaps_of(tile) if problem.m <= MOST_ROWS_OF_SHORT_LAUNCHES else (tile.overlap,):
                kind = (replace(tile, overlap=way), problem.leaves, problem.experts, problem.n % 16, problem.k % 16)
                kinds.setdefault(kind, (problem, kind[0]))
    for problem, tile in list(kinds.values())[index::of]:
        try:
            Bench(replace(problem, m=min(problem.m, 256))).result(tile)
            torch.cuda.synchronize()
        except RuntimeError:
            continue  # reported when the problem is tuned
        torch.cuda.empty_cache()


def main() -> int:
    """Tune and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__)
    parser.add_argument("--shapes", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the table; measurements go beside it as FILE.times.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no problem after this many seconds")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = problems(read_shapes(options.shapes) if options.shapes else default_shapes())
    if options.compile_share:
        index, of = (int(part) for part in options.compile_share.split("/"))
        compile_share(index, of, found)
        return 0
    begin = time.monotonic()
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.kernels.tune", "--out", str(options.out)]
    command += ["--shapes", str(options.shapes)] if options.shapes else []
    for process in [subprocess.Popen([*command, "--compile-share", f"{i}/{workers}"]) for i in range(workers)]:
        process.wait()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    table, lines = Table(torch.cuda.get_device_name(DEVICE)), []
    for problem in found:
        if time.monotonic() - begin > options.seconds:
            print("out of time", flush=True)
            break
        try:
            lines.append(tune_one(problem, table))
        except (RuntimeError, ValueError) as error:
            print(f"{problem.key} m={problem.m}: {error}"[:300], flush=True)
            continue
        print({key: value for key, value in lines[-1].items() if key != "times_us"}, flush=True)
        torch.cuda.empty_cache()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.save(options.out)
    options.out.with_suffix(".times.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in lines) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
