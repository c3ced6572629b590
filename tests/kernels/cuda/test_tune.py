"""The tuner of the matrix kernels: what it compiles and when, and how it races tiles. On a CPU, with a clock of our own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the tuner compiles kernels")

from benchmarks.kernels import tune
from benchmarks.kernels.shapes import default_shapes, gradient_shapes, other_shapes
from miles_plan.kernels.cuda.gemm import problem_of
from miles_plan.kernels.cuda.tuning import GemmProblem, GemmTile, Table, candidates, contenders, drips, ranked, table_for

SMS = 132


def test_every_rows_of_the_benchmark_are_tuned() -> None:
    stood_for = {(one.key, bucket) for one in tune.problems(default_shapes()) for bucket in tune.stands_for(one)}
    for shape in default_shapes():
        if shape.op == "matmul" and shape["dtype"] == "bfloat16":
            problem = GemmProblem(shape["M"], shape["N"], shape["K"], leaves=8 if shape["order"] == "tree" else 0)
            assert (problem.key, problem.bucket) in stood_for


def test_the_gradients_that_training_takes_are_tuned() -> None:
    """Of a product whose forward is a chain the input's gradient is the tree, and the other way round; whatever the tokens."""
    stood_for = {(one.key, bucket) for one in tune.problems(gradient_shapes()) for bucket in tune.stands_for(one)}
    for tokens in (3000, 4096, 9000, 16_384):
        for of in (
            GemmProblem(tokens, 2048, 12_288, leaves=8, b_kn=True), GemmProblem(12_288, 2048, tokens, a_km=True, b_kn=True),
            GemmProblem(tokens, 6144, 2048, b_kn=True), GemmProblem(tokens, 2048, 151_936, leaves=8, b_kn=True),
        ):  # fmt: skip
            assert (of.key, of.bucket) in stood_for


def test_a_gradients_choice_holds_for_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(2048, 6144, 16_384, a_km=True, b_kn=True)
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "multiprocessors", lambda _: SMS)
    best, other = ranked(problem, SMS)[:2]
    measured = SimpleNamespace(
        result=lambda tile: torch.zeros(1), reference=lambda: torch.zeros(1), times_s=lambda tiles: {best: 1e-4, other: 2e-4},
        short=lambda: False,
    )  # fmt: skip
    monkeypatch.setattr(tune, "Bench", lambda _: measured)
    table = Table("some GPU")
    tune.tune_one(problem, [best, other], table)
    for tokens in (5000, 16_384, 40_000):
        assert table.get(problem.of_tokens(tokens)) == best
    assert table.get(problem.of_tokens(4096)) is None
    assert table.get(GemmProblem(6144, 2048, 16_384, a_km=True, b_kn=True)) is None, "another layer's"


@pytest.mark.parametrize("problem", [
    GemmProblem(128, 256, 512, leaves=8, b_kn=True), GemmProblem(256, 128, 512, a_km=True, b_kn=True),
    GemmProblem(64, 128, 256), GemmProblem(64, 128, 256, experts=2),
])  # fmt: skip
def test_operands_lie_as_the_problem_says(problem: GemmProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[GemmProblem] = []
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "plan_tiles", lambda *_: torch.zeros(1))
    monkeypatch.setattr(tune, "gemm", lambda a, b, out, **given: found.append(
        problem_of(a, b, out, **{name: given[name] for name in ("leaves", "a_km", "b_kn", "experts")})
    ))  # fmt: skip
    bench = tune.Bench(problem)
    bench.reference()
    bench.result(ranked(problem, SMS)[0])
    assert found == [problem, problem]


def test_what_comes_first_is_compiled_first() -> None:
    table = table_for("NVIDIA H200")
    plan = [(problem, contenders(problem, SMS, table.get(problem))) for problem in tune.problems(other_shapes())[:12]]
    wanted, needed = tune.kinds(plan, SMS)
    assert needed == sorted(needed)
    assert needed[-1] == len(wanted)
    for (_, tiles), count in zip(plan, needed, strict=True):
        assert set(tiles) <= {tile for _, tile in wanted[:count]}
    assert len(wanted) < sum(len(tiles) for _, tiles in plan), "a kernel that several problems share is compiled once"


def test_the_few_rows_that_are_compiled_take_the_problems_kernel() -> None:
    dripping = 0
    for problem in tune.problems(other_shapes())[:40]:
        for tile in candidates(problem):
            small = replace(problem, m=tune.rows_that_compile_alike(problem, tile, SMS))
            assert small.m <= problem.m
            assert drips(tile, small, SMS) == drips(tile, problem, SMS), (tile, problem)
            dripping += drips(tile, problem, SMS)
    assert dripping > 20


class Clock:
    """Stands for the device: each tile takes its seconds, some rounds by chance more."""

    def __init__(self, seconds: dict[GemmTile, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[GemmTile, int] = dict.fromkeys(seconds, 0)
        self.ran: GemmTile | None = None
        self.seconds = seconds
        monkeypatch.setattr(tune, "event_ms", self.event_ms)

    def runs(self) -> dict[GemmTile, tune.Repeated]:
        return {tile: (lambda tile=tile: setattr(self, "ran", tile), 2) for tile in self.seconds}

    def event_ms(self, run: tune.Call) -> float:
        run()
        assert self.ran is not None
        self.calls[self.ran] += 1
        late = 1.5 if self.calls[self.ran] == 2 else 1.0
        return 2 * self.seconds[self.ran] * late * 1e3


def test_the_fastest_wins_and_the_slow_leave_early(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = ranked(GemmProblem(512, 4096, 4096), SMS)[:4]
    clock = Clock(dict(zip(tiles, (1.02e-5, 1.0e-5, 1.2e-5, 2e-5), strict=True)), monkeypatch)
    times = tune.time_by_elimination(clock.runs(), warming_s=0.0)
    assert min(times, key=lambda tile: times[tile]) == tiles[1]
    assert times[tiles[1]] == pytest.approx(1.0e-5), "one late round does not show in a median"
    assert clock.calls[tiles[0]] == clock.calls[tiles[1]] == tune.ROUNDS
    assert clock.calls[tiles[3]] == 1
    assert clock.calls[tiles[2]] < tune.ROUNDS


def test_few_rows_get_the_tile_that_is_good_alone_and_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(16, 6144, 4096)
    alone, layer, both, slow = ranked(problem, SMS)[:4]
    times = {alone: 1.0e-5, layer: 1.039e-5, both: 1.01e-5, slow: 1.05e-5}
    between = {alone: 1.5e-5, layer: 1.38e-5, both: 1.39e-5}

    class Measured:
        def __init__(self, problem: GemmProblem) -> None:
            self.few = problem.m <= tune.FEW_ROWS

        result = staticmethod(lambda tile: torch.zeros(1))
        reference = staticmethod(lambda: torch.zeros(1))
        times_s = staticmethod(lambda tiles: times)
        between_s = staticmethod(lambda tiles: {tile: between[tile] for tile in tiles})

        def short(self) -> bool:
            return self.few

    monkeypatch.setattr(tune, "Bench", Measured)
    monkeypatch.setattr(tune, "multiprocessors", lambda _: SMS)
    table = Table("some GPU")
    tune.tune_one(problem, list(times), table)
    assert table.get(problem) == both
    tune.tune_one(replace(problem, m=1024), list(times), table)
    assert table.get(replace(problem, m=1024)) == alone


@pytest.mark.parametrize(("leaves", "order"), [(0, "norm product gate"), (8, "gate product norm")])
def test_a_product_is_timed_between_what_stands_beside_it(leaves: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    rms_norm, swiglu = tune.rms_norm, tune.swiglu
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "multiprocessors", lambda _: SMS)
    monkeypatch.setattr(tune, "gemm", lambda *_, **__: ran.append("product"))
    monkeypatch.setattr(tune, "rms_norm", lambda *given: (ran.append("norm"), rms_norm(*given)))
    monkeypatch.setattr(tune, "swiglu", lambda *given: (ran.append("gate"), swiglu(*given)))
    monkeypatch.setattr(tune, "repeated", lambda calls, _: (calls[0], 1))
    monkeypatch.setattr(tune, "event_ms", lambda run: run() or 1.0)
    monkeypatch.setattr(tune, "WARMING_S", 0.0)
    problem = GemmProblem(16, 256, 512, leaves=leaves)
    bench = tune.Bench(problem)
    assert bench.short()
    tiles = ranked(problem, SMS)[:2]
    assert set(bench.times_s(tiles)) == set(tiles)
    assert set(ran) == {"product"}
    ran.clear()
    assert set(bench.between_s(tiles)) == set(tiles)
    assert " ".join(ran[-3:]) == order


def test_long_products_are_called_and_not_captured() -> None:
    calls = [lambda: torch.zeros(1), lambda: torch.ones(1)]
    assert tune.repeated(calls, expected_s=5e-3) == (calls[0], 1)
