"""Measure the tiles of the matrix kernels: python -m benchmarks.kernels.tune --out TABLE.json [--shapes FILE.json]

For every product of the list and every power of two of rows, the shipped table's choice and the tiles predicted fastest are
compared bit for bit with the portable kernel's result on random data, and the fastest that is equal wins. Of few rows the tiles
nearly as fast are timed again between the small kernels that stand beside the product in a layer, whose launches they overlap.
Processes compile ahead of the timing; the table is written as it grows, and begins as the shipped one. Point
MILES_PLAN_KERNEL_TABLE at it to use it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miles_plan.kernels.cuda.device import multiprocessors
from miles_plan.kernels.cuda.gemm import TREE_LEAVES, gemm
from miles_plan.kernels.cuda.grouped_matmul import plan_tiles
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.swiglu import swiglu
from miles_plan.kernels.cuda.toolchain import triton
from miles_plan.kernels.cuda.tuning import (
    LONG_S,
    GemmProblem,
    GemmTile,
    Table,
    candidates,
    contenders,
    drips,
    predict_s,
    table_for,
    tune,
)

from .shapes import Shape, default_shapes, gradient_shapes, other_shapes, read_shapes
from .timing import Call, copies, event_ms

DEVICE = torch.device("cuda")
# Measured rows, and the table's buckets each stands for: a choice for 8 rows is the choice for 1 (only the mask differs).
BUCKETS = {
    8: (1, 2, 4, 8), 16: (16,), 32: (32,), 64: (64,), 128: (128,), 256: (256,), 512: (512,), 1024: (1024,), 4096: (4096,),
    8192: (8192, 16_384, 32_768, 65_536), 2048: (2048,),
}  # fmt: skip
# The same of gradients: micro-batches are large, and of few tokens a prediction is as good.
GRADIENT_BUCKETS = {16_384: (8192, 16_384, 32_768, 65_536), 4096: (2048, 4096)}
MOST_WORKERS = 14
ROUNDS, ROUNDS_OF_LONG = 7, 4
BUDGET_S = 6e-4  # of one tile in one round
WARMING_S = 0.015  # until the clocks have risen
WARMING_OF_LONG_S = 0.05  # and fallen again to what the power allows
DROPPED_AT_ONCE, DROPPED = 1.25, 1.06  # a tile so many times slower than the fastest so far, after one round and later, is out
FEW_ROWS = 256  # of more, what stands beside a product takes little of its time
NEARLY = 1.04  # a tile so many times slower than the fastest may yet be the better one in a layer
BESIDE_HIDDEN, BESIDE_GATE_UP = 4096, 24_576  # widths of the small kernels beside a product
UNCAPTURED_S = 1e-3  # a product that takes this long needs no graph to hide its launch


def problems(shapes: Iterable[Shape]) -> list[GemmProblem]:
    """Every bf16 product of the list at every measured number of rows; the rows that no benchmark has, last."""
    found: dict[GemmProblem, None] = {}
    for shape in shapes:
        if shape.op == "matmul" and shape["dtype"] == "bfloat16":
            leaves = TREE_LEAVES if shape["order"] == "tree" else 0
            found |= dict.fromkeys(GemmProblem(m, shape["N"], shape["K"], leaves=leaves) for m in BUCKETS)
        elif shape.op == "matmul_gradients" and shape["dtype"] == "bfloat16":
            found |= dict.fromkeys(one for m in GRADIENT_BUCKETS for one in gradients_of(shape, m))
        elif shape.op == "grouped_matmul":
            experts = shape["experts"]
            found |= dict.fromkeys(
                GemmProblem(rows, shape["N"], shape["K"], experts=experts) for m in BUCKETS for rows in (m, 8 * m)
            )
    return sorted(found, key=lambda problem: problem.tokens == 2048)


def gradients_of(shape: Shape, tokens: int) -> tuple[GemmProblem, GemmProblem]:
    """The products that give a layer's gradients, of its input and of its weight."""
    n, k = shape["N"], shape["K"]
    leaves = TREE_LEAVES if shape["grad_order"] == "tree" else 0
    return GemmProblem(tokens, k, n, leaves=leaves, b_kn=True), GemmProblem(n, k, tokens, a_km=True, b_kn=True)


def stands_for(problem: GemmProblem) -> tuple[int, ...]:
    """The buckets of tokens that take what is the fastest for the problem's."""
    return (GRADIENT_BUCKETS if problem.b_kn else BUCKETS).get(problem.tokens, (problem.bucket,))


def lying(problem: GemmProblem) -> dict[str, Any]:
    """The problem as `gemm` is told it."""
    return {"leaves": problem.leaves, "a_km": problem.a_km, "b_kn": problem.b_kn, "experts": problem.experts}


class Bench:
    """One problem's random operands."""

    def __init__(self, problem: GemmProblem) -> None:
        self.problem = problem
        m, n, k, experts = problem.m, problem.n, problem.k, max(problem.experts, 1)
        count = copies(n * k * experts * problem.dtype.itemsize, 8)
        new = {"device": DEVICE, "dtype": problem.dtype}
        first = torch.randn((k, n) if problem.b_kn else (experts * n, k), **new).mul_(k**-0.5)
        self.weights = [first, *(first.clone() for _ in range(count - 1))]
        self.x = torch.randn((k, m) if problem.a_km else (m, k), **new)
        self.out = torch.empty(m, n, device=DEVICE, dtype=problem.out_dtype)
        self.counts = torch.zeros(experts, device=DEVICE, dtype=torch.int32)
        if problem.experts:
            self.counts = torch.bincount(torch.randint(0, experts, (m,), device=DEVICE), minlength=experts).int()

    def run(self, tile: GemmTile, weight: torch.Tensor, out: torch.Tensor) -> None:
        """The product by one tile, the plan of a grouped one included."""
        plan = plan_tiles(self.counts, self.problem.m, tile.height) if self.problem.experts else None
        gemm(
            self.x, weight, out, **lying(self.problem), plan=plan, plan_height=tile.height if plan is not None else 0, tile=tile
        )

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
            self.x, self.weights[0], out, **lying(self.problem), plan=plan, plan_height=64 if plan is not None else 0,
            portable=True,
        )  # fmt: skip
        return out

    def times_s(self, tiles: Sequence[GemmTile]) -> dict[GemmTile, float]:
        """Device seconds of each tile."""
        sms = multiprocessors(DEVICE)
        runs = {tile: repeated(self.calls(tile), predict_s(tile, self.problem, sms)) for tile in tiles}
        return time_by_elimination(runs, WARMING_S if self.short() else WARMING_OF_LONG_S)

    def calls(self, tile: GemmTile) -> list[Call]:
        """The product by one tile, with each of the weights."""
        return [partial(self.run, tile, weight, self.out) for weight in self.weights]

    def short(self) -> bool:
        """Whether the product takes so little time that what stands beside it matters."""
        problem = self.problem
        few = problem.m <= FEW_ROWS and not problem.experts and not problem.b_kn
        return few and min(predict_s(tile, problem, multiprocessors(DEVICE)) for tile in candidates(problem)) < LONG_S

    def between_s(self, tiles: Sequence[GemmTile]) -> dict[GemmTile, float]:
        """Device seconds of each tile and of two small kernels that stand beside it in a layer: trees (the projections back to the
        hidden state) come after the gating and before a norm, chains after a norm and before the gating."""
        new = {"device": DEVICE, "dtype": self.problem.dtype}
        hidden, gate_up = torch.randn(self.problem.m, BESIDE_HIDDEN, **new), torch.randn(self.problem.m, BESIDE_GATE_UP, **new)
        norm = partial(rms_norm, hidden, torch.ones(BESIDE_HIDDEN, **new), 1e-6, hidden)
        gate = partial(swiglu, gate_up)
        before, after = (gate, norm) if self.problem.leaves else (norm, gate)

        def run(product: Call) -> None:
            before()
            product()
            after()

        run(before)  # compiles them, which cannot be captured
        expected_s = predict_s(tiles[0], self.problem, multiprocessors(DEVICE))
        runs = {tile: repeated([partial(run, product) for product in self.calls(tile)], expected_s) for tile in tiles}
        return time_by_elimination(runs, WARMING_S)


Repeated = tuple[Call, int]  # a function, and how many calls it makes


def repeated(calls: Sequence[Call], expected_s: float) -> Repeated:
    """A function that makes enough of the calls, in turn, to fill BUDGET_S; where they are short, as a CUDA graph."""
    if expected_s >= UNCAPTURED_S:
        return calls[0], 1
    repeats = max(4, int(BUDGET_S / expected_s))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            calls[i % len(calls)]()
    return graph.replay, repeats


def time_by_elimination(runs: dict[GemmTile, Repeated], warming_s: float) -> dict[GemmTile, float]:
    """Seconds a call of each: rounds in turn, so that clocks and power hit all of them alike, and those that fall behind leave. The
    figure is the median of a tile's rounds. Before them, a while in which the clocks rise, and fall to what the power allows."""
    samples: dict[GemmTile, list[float]] = {tile: [] for tile in runs}
    racing = list(runs)
    begin = time.monotonic()
    while time.monotonic() - begin < warming_s:
        event_ms(runs[racing[0]][0])
    for turn in range(ROUNDS if any(repeats > 1 for _, repeats in runs.values()) else ROUNDS_OF_LONG):
        for tile in racing if turn % 2 == 0 else reversed(racing):
            run, repeats = runs[tile]
            samples[tile].append(event_ms(run) / repeats * 1e-3)
        figures = {tile: statistics.median(samples[tile]) for tile in racing}
        best = min(figures.values())
        racing = [tile for tile in racing if figures[tile] <= (DROPPED if turn else DROPPED_AT_ONCE) * best]
    return {tile: statistics.median(values) for tile, values in samples.items()}


def tune_one(problem: GemmProblem, tiles: Sequence[GemmTile], table: Table) -> dict[str, object]:
    """Tune one problem, copy the choice to the buckets it stands for, and say how good the prediction was."""
    bench = Bench(problem)
    sms = multiprocessors(DEVICE)
    times = tune(problem, bench.result, bench.reference(), bench.times_s, tiles, table)
    best = table.get(problem)
    assert best is not None
    near = [tile for tile in times if times[tile] <= NEARLY * times[best]]
    between: dict[GemmTile, float] = {}
    if bench.short() and len(near) > 1:
        between = bench.between_s(near)
        best = min(near, key=lambda tile: times[tile] * between[tile])
    predicted = min(times, key=lambda tile: predict_s(tile, problem, sms))
    for tokens in stands_for(problem):
        table.put(problem.of_tokens(tokens), best)
    return {
        "key": problem.key, "m": problem.tokens, "best_us": round(times[best] * 1e6, 2), "best": _numbers(best),
        "predicted_over_best": round(times[predicted] / times[best], 3), "unequal": sum(tile not in times for tile in tiles),
        "times_us": [[*_numbers(tile), round(s * 1e6, 2)] for tile, s in sorted(times.items(), key=lambda p: p[1])],
        "between_us": [[*_numbers(tile), round(s * 1e6, 2)] for tile, s in sorted(between.items(), key=lambda p: p[1])],
    }  # fmt: skip


def _numbers(tile: GemmTile) -> list[int]:
    return [int(value) for value in astuple(tile)]


Kind = tuple[GemmProblem, GemmTile | None]  # None: the portable kernel


def kinds(plan: Iterable[tuple[GemmProblem, Sequence[GemmTile]]], sms: int) -> tuple[list[Kind], list[int]]:
    """The distinct kernels of the plan in the order of need, and for each problem how many of them it and those before it take."""
    found: dict[tuple[object, ...], Kind] = {}
    needed = []
    for problem, tiles in plan:
        same = (*lying(problem).values(), problem.n % 16, problem.k % 16)
        found.setdefault((min(problem.m, 32), *same), (problem, None))
        leaf = problem.k // max(problem.leaves, 1)
        for tile in tiles:
            ends = (leaf % tile.depth,) if problem.leaves else (problem.k <= tile.depth, drips(tile, problem, sms))
            found.setdefault((tile, *ends, *same), (problem, tile))
        needed.append(len(found))
    return list(found.values()), needed


def rows_that_compile_alike(problem: GemmProblem, tile: GemmTile | None, sms: int) -> int:
    """As few rows as take the kernel that the problem's take: whether a tile `drips` is compiled into it."""
    few = min(problem.m, 64)
    if tile is None or not drips(tile, problem, sms):
        return few
    column_tiles = -(-problem.n // tile.width)
    return max(few, min(problem.m, tile.height * (sms // column_tiles + 1)))


def compile_share(index: int, of: int, wanted: Sequence[Kind], done: Any) -> None:
    """A worker: compile every `of`-th kernel from `index` into Triton's cache, and count them in done[index]. It launches nothing, so
    that it disturbs no timing."""
    launch, sms = triton.JITFunction.run, multiprocessors(DEVICE)
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **rest: launch(kernel, *args, grid=grid, warmup=True, **rest)
    for problem, tile in wanted[index::of]:
        try:
            small = replace(problem, m=rows_that_compile_alike(problem, tile, sms))
            new = {"device": DEVICE, "dtype": small.dtype}
            a = torch.empty((small.k, small.m) if small.a_km else (small.m, small.k), **new)
            b = torch.empty((small.k, small.n) if small.b_kn else (max(small.experts, 1) * small.n, small.k), **new)
            out = torch.empty(small.m, small.n, device=DEVICE, dtype=small.out_dtype)
            plan = torch.empty(1, device=DEVICE, dtype=torch.int32) if small.experts else None
            height = (tile.height if tile else 64) if small.experts else 0
            gemm(a, b, out, **lying(small), plan=plan, plan_height=height, tile=tile, portable=tile is None)
        except (RuntimeError, ValueError, triton.TritonError) as error:  # the tuner meets it again, and reports it
            print(f"not compiled: {problem.key} {tile}: {error}"[:300], flush=True)
        done[index] += 1


class Compilers:
    """Processes that fill Triton's cache in the order of need."""

    def __init__(self, wanted: Sequence[Kind]) -> None:
        context = multiprocessing.get_context("spawn")
        self.of = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        self.done = context.Array("i", self.of, lock=False)
        self.processes = [
            context.Process(target=compile_share, args=(i, self.of, wanted, self.done), daemon=True) for i in range(self.of)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, count: int) -> None:
        """Until the first `count` kernels are compiled, or their compilers have ended."""
        while any(
            process.is_alive() and self.done[i] < len(range(i, count, self.of)) for i, process in enumerate(self.processes)
        ):
            time.sleep(0.01)

    def stop(self) -> None:
        """End those that still run."""
        for process in self.processes:
            process.terminate()


def main() -> int:
    """Tune and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__)
    parser.add_argument(
        "--shapes", type=Path, help="a JSON list of shapes; without it the benchmark's, small models' and gradients"
    )
    parser.add_argument("--out", type=Path, required=True, help="the table; measurements go beside it as FILE.times.jsonl")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no problem after this many seconds")
    options = parser.parse_args()
    begin = time.monotonic()
    found = problems(read_shapes(options.shapes) if options.shapes else default_shapes() + other_shapes() + gradient_shapes())
    gpu = torch.cuda.get_device_name(DEVICE)
    shipped, sms = table_for(gpu), multiprocessors(DEVICE)
    plan = [(problem, contenders(problem, sms, shipped.get(problem))) for problem in found]
    wanted, needed = kinds(plan, multiprocessors(DEVICE))
    compilers = Compilers(wanted)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = Table(gpu, {key: dict(row) for key, row in shipped.choices.items()})
    print(f"{len(found)} problems, {len(wanted)} kernels", flush=True)
    waited_s, count = 0.0, 0
    with options.out.with_suffix(".times.jsonl").open("w") as times:
        for (problem, tiles), kernels in zip(plan, needed, strict=True):
            before = time.monotonic()
            if before - begin > options.seconds:
                print("out of time", flush=True)
                break
            compilers.wait_for(kernels)
            waited_s += time.monotonic() - before
            try:
                entry = tune_one(problem, tiles, table)
            except (RuntimeError, ValueError, triton.TritonError) as error:
                print(f"{problem.key} m={problem.tokens}: {error}"[:300], flush=True)
                continue
            count += 1
            print({key: value for key, value in entry.items() if not key.endswith("_us") or key == "best_us"}, flush=True)
            times.write(json.dumps(entry) + "\n")
            times.flush()
            table.save(options.out)
            torch.cuda.empty_cache()
    compilers.stop()
    print(
        f"{count} of {len(found)} problems in {time.monotonic() - begin:.0f} s, {waited_s:.0f} s of them compiling", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
