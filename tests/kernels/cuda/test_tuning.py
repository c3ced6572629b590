"""Which tile is chosen: only tiles that fit, only tiles proven equal, the table first, something sensible without it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.kernels.cuda import tuning
from miles_plan.kernels.cuda.tuning import (
    PIECES,
    RING,
    GemmProblem,
    GemmTile,
    Table,
    candidates,
    choose,
    overlaps_of,
    predict_s,
    prove,
    table_for,
    tune,
)

SMS = 132
problems = st.builds(
    GemmProblem,
    m=st.integers(1, 70_000),
    n=st.sampled_from([16, 200, 2112, 4096, 151_936]),
    k=st.sampled_from([128, 512, 4096, 28_672]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    leaves=st.sampled_from([0, 1, 2, 4, 8]),
    b_kn=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_every_candidate_fits_and_is_priced(problem: GemmProblem) -> None:
    tiles = candidates(problem, SMS)
    assert tiles
    for tile in tiles:
        assert tile.fits(problem.dtype.itemsize, problem.out_dtype.itemsize, problem.leaves)
        assert (
            tile.shared_bytes(problem.dtype.itemsize, problem.out_dtype.itemsize, problem.leaves) <= tuning.SHARED_MEMORY_BYTES
        )
        assert predict_s(tile, problem, SMS) > 0
        if problem.leaves:
            leaf = problem.k // problem.leaves
            assert leaf % tile.depth == 0 or tile.engine == PIECES, "a stage must not cross a leaf"
            assert tile.extra == 0 or tile.engine == PIECES
            assert tile.engine != PIECES or leaf >= 2 * tile.depth, (
                "the left half ends while the next leaf's second stage is multiplied"
            )


def test_a_width_that_fills_the_last_wave_is_among_those_timed() -> None:
    # 5,120 columns and 256 rows are 128 tiles of 128 x 80 and 80 of 128 x 128; 7,168 are 128 of 128 x 112.
    for problem, width in ((GemmProblem(256, 5120, 2048), 80), (GemmProblem(256, 7168, 2048, leaves=8), 112)):
        assert width in {tile.width for tile in tuning.ranked(problem, SMS) if tile.engine == PIECES}
    for other in (GemmProblem(256, 5120, 2048, experts=8), GemmProblem(256, 5121, 2048)):
        assert all(tile.engine != PIECES for tile in candidates(other, SMS))


def test_gradients_are_cut_into_pieces_of_64_columns() -> None:
    for problem in (
        GemmProblem(4096, 6144, 2048, b_kn=True),
        GemmProblem(12_288, 2048, 4096, a_km=True, b_kn=True),
    ):
        tiles = [tile for tile in tuning.ranked(problem, SMS) if tile.engine == PIECES]
        assert tiles
        assert all(tile.cols == 64 for tile in tiles), "the width of a swizzled row"
    # An eighth of the vocabulary is 18,992 = 64 x 296 + 48; stages of 16, which divide it, took 1.4 times as long.
    assert choose(GemmProblem(4096, 2048, 151_936, leaves=8, b_kn=True), "NVIDIA X", SMS).depth == 64


def test_shared_memory_is_the_rings_but_for_what_of_a_tree_registers_do_not_hold() -> None:
    def pieces(leaves: int) -> dict[int, GemmTile]:
        tiles = candidates(GemmProblem(256, 7168, 2048, leaves=leaves), SMS)
        return {tile.width: tile for tile in tiles if tile.engine == PIECES and tile.height == 128}

    chain, tree = pieces(0), pieces(8)
    assert (chain[112].stages, chain[256].stages) == (7, 4)
    assert {tile.stashed(2, 0) for tile in chain.values()} == {0}
    assert (tree[80].stages, tree[112].stages, tree[128].stages) == (8, 7, 6)
    assert max(tree) == 128
    for tile in tree.values():
        stashed, pairs = tile.stashed(2, 8), tile.pairs_stashed(2, 8)
        assert 64 * (4 * tile.width - stashed * tile.cols) // 128 <= tuning.SUM_REGISTERS
        assert 64 * (4 * tile.width - pairs * tile.cols) // 128 <= tuning.SUM_REGISTERS
        assert pairs <= stashed <= tile.pieces


@settings(max_examples=40, deadline=None)
@given(problems)
def test_a_tables_text_reads_back(problem: GemmProblem) -> None:
    table = Table("some gpu")
    tile = candidates(problem, SMS)[-1]
    table.put(problem, tile)
    again = Table.from_json(table.to_json())
    assert again.get(problem) == tile
    assert again.get(replace(problem, m=problem.bucket)) == tile
    assert again.get(replace(problem, n=problem.n + 16)) is None


def test_only_tiles_with_the_references_bits_are_timed() -> None:
    problem = GemmProblem(512, 4096, 4096)
    tiles = tuning.ranked(problem, SMS)
    wrong = tiles[1]
    reference = torch.arange(4.0)

    def run(tile: GemmTile) -> torch.Tensor:
        return reference + 1e-6 if tile == wrong else reference.clone()

    assert prove(run, tiles, reference) == [tile for tile in tiles if tile != wrong]
    table = Table("some gpu")
    timed: list[GemmTile] = []

    def time_s(proven: object) -> dict[GemmTile, float]:
        timed.extend(proven)  # type: ignore[call-overload]  # a sequence of tiles
        return {tile: 1.0 if tile == tiles[3] else 2.0 for tile in timed}

    tune(problem, run, reference, time_s, tiles, table)
    assert wrong not in timed
    assert table.get(problem) == tiles[3]
    with pytest.raises(ValueError, match="no tile of chain/nt"):
        tune(problem, lambda tile: reference + 1, reference, time_s, tiles, table)


@pytest.fixture
def users_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[GemmProblem, GemmTile], None]]:
    """Puts a choice into the table that the environment names."""
    table = Table("NVIDIA X")
    table.save(tmp_path / "table.json")
    monkeypatch.setenv(tuning.TABLE_VARIABLE, str(tmp_path / "table.json"))

    def measured(problem: GemmProblem, tile: GemmTile) -> None:
        table.put(problem, tile)
        table.save(tmp_path / "table.json")
        table_for.cache_clear()
        choose.cache_clear()

    table_for.cache_clear()
    choose.cache_clear()
    yield measured
    table_for.cache_clear()
    choose.cache_clear()


SLOW = GemmTile(RING, False, 64, 1, 64, 0, 64, 3, 1, 0)


def test_the_users_table_comes_before_the_prediction(users_table: Callable[[GemmProblem, GemmTile], None]) -> None:
    problem = GemmProblem(512, 4096, 4096)
    users_table(problem, SLOW)
    assert choose(problem, "NVIDIA X", SMS) == SLOW
    assert choose(replace(problem, m=513), "NVIDIA X", SMS) != SLOW
    few, many = replace(problem, m=20), replace(problem, m=3000)
    for other in (few, many):
        users_table(other, SLOW)
        assert choose(other, "NVIDIA X", SMS) == SLOW, "whatever is predicted"


@pytest.mark.parametrize("leaves", [0, 8])
def test_of_fewer_tokens_than_a_table_was_measured_for_a_clearly_faster_tile_is_taken(
    leaves: int, users_table: Callable[[GemmProblem, GemmTile], None]
) -> None:
    problem = GemmProblem(512, 4096, 4096, leaves=leaves)
    full = choose(problem, "NVIDIA X", SMS)
    users_table(problem, full)
    taken = set()
    for tokens in range(257, 512, 6):
        fewer = replace(problem, m=tokens)
        best = min(candidates(fewer, SMS), key=lambda tile: predict_s(tile, fewer, SMS))
        clearly = predict_s(full, fewer, SMS) > tuning.CLEARLY * predict_s(best, fewer, SMS)
        assert choose(fewer, "NVIDIA X", SMS) == (best if clearly else full)
        taken.add(clearly)
    assert taken == {False, True}


def test_what_is_measured_of_one_half_precision_holds_for_the_other() -> None:
    problem = GemmProblem(4096, 6144, 4096)
    measured = table_for("NVIDIA H200").get(problem)
    assert measured is not None
    assert choose(replace(problem, dtype=torch.float16, out_dtype=torch.float16), "NVIDIA H200", SMS) == measured
    assert table_for("NVIDIA H200").get(replace(problem, dtype=torch.float32, out_dtype=torch.float32)) is None


@pytest.mark.parametrize("m", [1, 16, 24])
def test_few_tokens_of_a_tree_whose_leaves_end_inside_deep_stages_take_no_shallow_ones(m: int) -> None:
    tile = choose(GemmProblem(m, 4096, 13_696, leaves=8), "NVIDIA H200", SMS)
    assert (tile.engine, tile.swap, tile.depth, tile.width) == (PIECES, True, 64, 16)
    assert not any(one.engine == PIECES for one in candidates(GemmProblem(m, 4096, 4096, leaves=8)))


def test_the_shipped_table_names_only_candidates() -> None:
    table = table_for("NVIDIA H200")
    assert len(table.choices) >= 20
    for key, row in table.choices.items():
        for m, tile in row.items():
            problem = problem_of(key, m)
            assert problem.key == key
            launches = {replace(one, overlap=way) for one in candidates(problem, SMS) for way in overlaps_of(one)}
            assert tile in launches, (key, m, tile)


def problem_of(key: str, m: int) -> GemmProblem:
    """The problem of a table's key."""
    family, lying, _, _, sizes, *experts = key.split("/")
    n, k = (int(size) for size in sizes.split("x"))
    leaves = 8 if family == "tree8" else 0
    if lying == "tn":
        return GemmProblem(k, n, m, leaves=leaves, a_km=True, b_kn=True)
    return GemmProblem(m, n, k, leaves=leaves, b_kn=lying == "nn", experts=int(experts[0][1:]) if experts else 0)


def test_the_tile_predicted_fastest_is_nearly_the_fastest() -> None:
    # Of each product the fastest tiles that the tuner timed on an H200 on 21 November 2026; no shape's table is consulted.
    lost = []
    for line in (Path(__file__).parent / "tile_times_h200.jsonl").read_text().splitlines():
        entry = json.loads(line)
        problem = problem_of(entry["key"], entry["m"])
        times = {tuning._tile_of(numbers[:11]): numbers[11] for numbers in entry["times_us"]}
        chosen = min(reversed(times), key=lambda tile: predict_s(tile, problem, SMS))  # of equals the slowest
        lost.append(times[chosen] / entry["best_us"])
    assert len(lost) > 200
    assert statistics.geometric_mean(lost) < 1.025
    assert sum(loss > 1.1 for loss in lost) < len(lost) / 15
    assert max(lost) < 1.3


@pytest.mark.parametrize("m", [1, 7, 63, 300, 5000])
def test_a_shape_outside_the_table_gets_a_tile(m: int) -> None:
    problem = GemmProblem(m, 3000, 1000)
    assert table_for("NVIDIA H200").get(problem) is None
    assert choose(problem, "NVIDIA H200", SMS) in candidates(problem, SMS)


@pytest.mark.parametrize("problem", [
    GemmProblem(1, 3000, 2048), GemmProblem(1, 3072, 2048, leaves=8), GemmProblem(1, 3072, 2048, leaves=8, b_kn=True),
    GemmProblem(3072, 2048, 1, a_km=True, b_kn=True),
])  # fmt: skip
def test_micro_batches_of_about_as_many_tokens_take_one_tile(problem: GemmProblem) -> None:
    """Each tile is a kernel to compile, and each prediction costs the host a millisecond."""

    of = problem.of_tokens
    counts = range(15_400, 16_385, 41)
    tiles = {choose(of(tokens), "NVIDIA X", SMS) for tokens in counts}
    assert len(tiles) == 1
    assert all(tiles <= set(candidates(of(tokens), SMS)) for tokens in (15_401, 15_999, 16_384)), "it fits every one"
    for few in (1, 63, 1000):
        best = min(candidates(of(few), SMS), key=lambda tile: predict_s(tile, of(few), SMS))
        assert choose(of(few), "NVIDIA X", SMS) == best
