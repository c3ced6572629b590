"""Which tile a matrix kernel runs with: a table measured per GPU, and a prediction where the table is silent.

Every tile computes the same bits (`gemm_kernel` says why, `prove` shows it on the GPU at hand), so a choice here can change
time and nothing else. That is what makes it legal to choose by M: the tuner times only tiles that `prove` let through.

The shipped tables are `tables/<gpu>.json`; `tune` measures one shape, and `Table.save` writes a file that the environment
variable MILES_PLAN_KERNEL_TABLE names to be read in place of the shipped one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch

SHARED_MEMORY_BYTES = 232_448  # what one Hopper thread block may use
TABLE_VARIABLE = "MILES_PLAN_KERNEL_TABLE"
BARRIER_BYTES = 1_024  # barriers and alignment, rounded up
LARGEST_BUCKET = 65_536
EXACT_TOKENS = 1024  # up to here a tile is predicted for the very number of tokens
MOST_STAGES = 12
LEAST_LEAF = 128  # of K, for a tile in pieces: the left half ends while a second stage is multiplied
FEW_ROWS = 32  # for so few a tile in pieces was never the fastest where leaves are whole numbers of DEEP stages
DEEP = 128  # of K, what a stage of the decode kernels wants
WIDEST, WIDEST_TREE = 256, 128  # columns of a tile in pieces
CLEARLY = 1.05  # of 65 products of 48 to 384 tokens the choice lost 1.4 % on the fastest measured, the table's tile alone 7.4 %
LAUNCHED_IN_EVERY_WAY = 3  # of the tiles that come first
HOPELESS = 1.35  # a tile predicted to take so many times the fastest's seconds is not timed
LONG_S = 2e-4  # of products that take this long the launch does not matter

RING, DIRECT, SKINNY, PIECES = 0, 1, 2, 3  # `gemm_kernel`, `gemm_direct_kernel`, `gemm_skinny_kernel`, `gemm_pieces_kernel`
SUM_REGISTERS = 224  # in which a thread may hold the sums of a tree in pieces
FOUR_SUMS_REGISTERS = 200  # the same where its left half ends, and four are under way

# For `predict_s` only: an H200's rates, and what fits 4,500 measured times of 270 products on one. Over them the tile predicted
# fastest took 1.6 % more than the fastest (geometric mean; 1.27 times at worst), and 2.5 % over shapes that the fit did not see.
CLOCK_HZ = 1.74e9
MEMORY_BYTES_PER_S = 4.0e12
L2_BYTES_PER_CYCLE = 62.0  # into one multiprocessor
BYTES_IN_FLIGHT = 140_000  # a ring that holds less shows the latency
START_S = {RING: 4.3e-6, PIECES: 4.0e-6, DIRECT: 2.35e-6, SKINNY: 2.3e-6}
TILE_CYCLES = {RING: 1_900.0, PIECES: 1_300.0, DIRECT: 950.0, SKINNY: 1_100.0}  # to begin and end a tile
STEP_CYCLES = {RING: 32.0, PIECES: 32.0, DIRECT: 106.0}  # to pass a stage on
LEAF_CYCLES = {RING: 140.0, PIECES: 140.0, DIRECT: 425.0}  # to begin and end a leaf of a tree
SKINNY_CYCLES_PER_TOKEN = 6.5  # of one k16 step in one warp, whatever its few rows
NEARLY_MOST, MOST = 3.6, 5.0  # how little the lesser of two that overlap adds to the greater: inside a tile, of work and memory


@dataclass(frozen=True, order=True)
class GemmTile:
    """How a product is cut, and by which kernel."""

    engine: int
    swap: bool  # the weights in the rows of the matrix unit, the tokens in its columns
    rows: int  # rows of one warp group (of the tile, for SKINNY)
    consumers: int  # warp groups that multiply (warps, for SKINNY)
    cols: int
    extra: int  # a second, narrower column block, so that tiles such as 128 x 192 exist; 0 for none
    depth: int  # K elements a stage
    stages: int
    group: int  # row tiles walked down before the next column tile
    store: int  # 0 from registers, 1 by TMA, 2 from registers as whole rows
    overlap: int = (
        0  # see `overlap`: 0 starts after the kernel before has ended, 1 and 2 while it ends; 2 lets the next do so early
    )

    @property
    def height(self) -> int:
        """Rows of a thread block's tile."""
        return self.rows if self.engine == SKINNY else self.rows * self.consumers

    @property
    def width(self) -> int:
        """Columns of a thread block's tile."""
        return self.cols + self.extra

    def shared_bytes(self, itemsize: int, out_itemsize: int, leaves: int) -> int:
        """Shared memory the kernel will ask for."""
        ring = self.stages * (self.height + self.width) * self.depth * itemsize
        if self.engine == PIECES:
            return ring + self.stashed(itemsize, leaves) * self.height * self.cols * 4 + BARRIER_BYTES
        staged = self.cols if self.extra == self.cols else self.width  # equal halves leave one after the other
        staging = self.height * staged * out_itemsize if self.store else 0
        stash = self.height * self.cols * 4 if self.stashes(leaves) else 0
        beside = max(staging, stash) if self.store == 1 else staging + stash  # TMA stores leave through the stash
        return ring + beside + BARRIER_BYTES

    def stashes(self, leaves: int) -> bool:
        """A full tree over a tile this wide keeps its uppermost level in shared memory."""
        return leaves == 8 and self.engine == RING and self.rows * self.cols >= 64 * 128

    def stashed(self, itemsize: int, leaves: int) -> int:
        """Of a tree in pieces, how many of the left half's wait in shared memory: as many as the ring leaves room for."""
        room = SHARED_MEMORY_BYTES - BARRIER_BYTES - self.stages * (self.height + self.width) * self.depth * itemsize
        return max(0, min(self.pieces, room // (self.height * self.cols * 4))) if leaves else 0

    @property
    def pieces(self) -> int:
        """Pieces side by side in a tile of PIECES."""
        return self.width // self.cols

    def pairs_stashed(self, itemsize: int, leaves: int) -> int:
        """Of a tree in pieces, how many of the left pair's wait there until the left half has ended."""
        most = self.stashed(itemsize, leaves)
        return max(0, min(most, -(-(4 * self.width - 2 * FOUR_SUMS_REGISTERS) // self.cols)))

    @property
    def defers(self) -> bool:
        """Whether registers hold a finished tile while the next one begins. (For a narrow tile that is also the form which the
        assembler overlaps: without it, it waits after every product.)"""
        return self.engine == RING and self.rows * self.width <= 96 * 128

    def fits(self, itemsize: int, out_itemsize: int, leaves: int) -> bool:
        """Whether registers and shared memory suffice."""
        pieced = self.engine == PIECES
        levels = 1 if leaves == 0 else 3 if pieced or self.stashes(leaves) else min(leaves.bit_length(), 4)
        in_registers = self.rows * self.width // 128 * levels <= 192
        if pieced and leaves:
            sums = 4 * self.width - self.stashed(itemsize, leaves) * self.cols  # columns of 64 rows
            in_registers &= sums // 2 <= SUM_REGISTERS
        return in_registers and self.shared_bytes(itemsize, out_itemsize, leaves) <= SHARED_MEMORY_BYTES

    def per_multiprocessor(self, itemsize: int, out_itemsize: int, leaves: int) -> int:
        """Thread blocks that run beside each other on one multiprocessor; a ring kernel takes it whole."""
        if self.engine in (RING, PIECES):
            return 1
        return max(1, min(8, SHARED_MEMORY_BYTES // self.shared_bytes(itemsize, out_itemsize, leaves)))


@dataclass(frozen=True)
class GemmProblem:
    """One product C[M, N] = A[M, K] B[N, K]^T as the tuner sees it."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    leaves: int = 0
    a_km: bool = False  # A lies as [K, M]
    b_kn: bool = False  # B lies as [K, N]
    experts: int = 0  # 0: one weight; otherwise rows sorted by expert and B is [experts, N, K]

    @property
    def tokens(self) -> int:
        """Rows of the batch: M or, in a weight's gradient, what is summed over."""
        return self.k if self.a_km else self.m

    def of_tokens(self, tokens: int) -> GemmProblem:
        """The same layer's product for another batch."""
        return replace(self, k=tokens) if self.a_km else replace(self, m=tokens)

    @property
    def key(self) -> str:
        """The table's key: everything but the tokens, which are bucketed to the next power of two."""
        lying = ("t" if self.a_km else "n") + ("n" if self.b_kn else "t")
        family = f"tree{self.leaves}" if self.leaves else "chain"
        dtype, out = (str(d).removeprefix("torch.") for d in (self.dtype, self.out_dtype))
        experts = f"/e{self.experts}" if self.experts else ""
        return f"{family}/{lying}/{dtype}/{out}/{self.n}x{self.m if self.a_km else self.k}{experts}"

    @property
    def bucket(self) -> int:
        """The tokens rounded up to a power of two."""
        return min(1 << max(self.tokens - 1, 0).bit_length(), LARGEST_BUCKET)


def predict_s(tile: GemmTile, problem: GemmProblem, multiprocessors: int) -> float:
    """Seconds the tile should take: the slowest of matrix unit, L2 port and memory, plus what each wave, step and leaf costs.

    Good enough to rank tiles for shapes nobody measured; the table overrides it.
    """
    tiles = tile_count(tile, problem)
    itemsize = problem.dtype.itemsize
    beside = tile.per_multiprocessor(itemsize, problem.out_dtype.itemsize, problem.leaves)
    beside = min(beside, -(-tiles // multiprocessors))
    waves = -(-tiles // (multiprocessors * beside))
    # A ring must hold what the port carries in a latency, or the latency shows.
    in_flight = (tile.stages - 1) * (tile.height + tile.width) * tile.depth * itemsize * beside
    load_cycles = problem.k * (tile.height + tile.width) * itemsize * beside / L2_BYTES_PER_CYCLE
    load_cycles *= max(1.0, BYTES_IN_FLIGHT / in_flight)
    wave_cycles = _overlapped(_mma_cycles(tile, beside) * problem.k / 16, load_cycles, NEARLY_MOST)
    wave_cycles += STEP_CYCLES.get(tile.engine, 0.0) * problem.k / tile.depth
    wave_cycles += LEAF_CYCLES.get(tile.engine, 0.0) * problem.leaves
    wave_cycles += TILE_CYCLES[tile.engine] / (beside if tile.engine == DIRECT else 1)  # neighbours work meanwhile
    touched = min(problem.experts, problem.m) if problem.experts else 1
    moved = itemsize * (problem.m * problem.k + touched * problem.n * problem.k)
    moved += problem.out_dtype.itemsize * problem.m * problem.n
    return START_S[tile.engine] + _overlapped(waves * wave_cycles / CLOCK_HZ, moved / MEMORY_BYTES_PER_S, MOST)


def _overlapped(x: float, y: float, sharpness: float) -> float:
    """What two that go on at once take: more than either, less than the sum."""
    return float((x**sharpness + y**sharpness) ** (1 / sharpness))


def _mma_cycles(tile: GemmTile, beside: int) -> float:
    """Cycles of one k16 step of `beside` tiles. On the matrix unit narrow parts wait for shared memory; a skinny tile's few warps
    wait for their own registers to be filled."""
    if tile.engine == SKINNY:
        return SKINNY_CYCLES_PER_TOKEN * tile.cols / tile.consumers * max(1.0, beside * tile.consumers / 4)
    parts = [tile.width] if tile.engine == PIECES else [part for part in (tile.cols, tile.extra) if part]
    of_64_rows = sum(_overlapped(part / 2, (64 + part) * 32 / 128, NEARLY_MOST) for part in parts)
    return beside * of_64_rows * max(tile.height, 16) / 64


def _skinny_tiles(problem: GemmProblem) -> Iterable[GemmTile]:
    """Tiles for up to 64 tokens, whose stages must divide K. A tree would keep its levels in the registers of few warps."""
    tokens = max(16, 1 << (problem.m - 1).bit_length())
    if tokens > 64 or problem.n % 16 or problem.leaves:
        return
    shapes = ((16, 1, 256, 4), (16, 2, 256, 4), (32, 2, 256, 4), (32, 4, 256, 4), (64, 4, 128, 6), (64, 4, 256, 4))
    for rows, warps, depth, stages in shapes:
        if problem.k % depth == 0:
            yield GemmTile(SKINNY, True, rows, warps, tokens, 0, depth, stages, 1, 0)


def _decode_tiles(whole: int) -> Iterable[GemmTile]:
    """Tiles for few tokens: the weights in the rows, or the tokens in one row tile of 64."""
    for cols, depth, stages in ((8, 128, 9), (8, 256, 5), (16, 128, 8), (16, 256, 4), (32, 128, 8), (64, 128, 6)):
        if cols >= 32:  # for fewer tokens the other kernels start sooner
            yield GemmTile(RING, True, 64, 1, cols, 0, depth, stages, 1, 0)
        yield GemmTile(DIRECT, True, 64, 1, cols, 0, depth, stages, 1, 0)
    for cols, depth, stages in ((8, 128, 5), (8, 256, 3), (8, 128, 4), (16, 128, 5), (16, 128, 4), (32, 128, 4), (64, 128, 3)):
        yield GemmTile(DIRECT, True, 64, 1, cols, 0, depth, stages, 1, 0)
    for cols, depth, stages in ((16, 128, 8), (32, 128, 8), (64, 128, 6)):
        yield GemmTile(RING, False, 64, 1, cols, 0, depth, stages, 8, 0)
        yield GemmTile(DIRECT, False, 64, 1, cols, 0, depth, stages, 8, 0)
    yield GemmTile(DIRECT, False, 64, 1, 128, 0, 64, 8, 8, whole)


def _wide_tiles(store: int, whole: int, m: int) -> Iterable[GemmTile]:
    """Tiles for many tokens, each with as many stages as memory holds."""
    shapes = [
        (64, 1, 64, 0, 64), (64, 1, 64, 0, 128), (64, 1, 128, 0, 64), (64, 1, 64, 32, 64),
        (64, 1, 128, 64, 64),
        (64, 1, 256, 0, 64), (64, 2, 64, 0, 64), (64, 2, 32, 0, 64), (64, 2, 64, 16, 64), (64, 2, 64, 32, 64),
        (64, 2, 128, 0, 64), (64, 2, 128, 32, 64), (64, 2, 128, 64, 64), (64, 2, 256, 0, 64),
        (64, 2, 128, 128, 64), (128, 2, 64, 0, 64), (128, 2, 128, 0, 64),
    ]  # fmt: skip
    for rows, consumers, cols, extra, depth in shapes:
        yield GemmTile(RING, False, rows, consumers, cols, extra, depth, MOST_STAGES, 8, store)
        if rows * consumers >= 128 and cols + extra >= 128 and m > 8 * rows * consumers:
            yield GemmTile(RING, False, rows, consumers, cols, extra, depth, MOST_STAGES, 16, store)
    for consumers, cols, depth, stages in ((1, 64, 64, 5), (1, 128, 64, 4), (2, 64, 64, 4), (2, 64, 64, 8), (2, 128, 64, 6)):
        yield GemmTile(DIRECT, False, 64, consumers, cols, 0, depth, stages, 8, whole)
    yield GemmTile(RING, True, 64, 2, 64, 0, 64, MOST_STAGES, 8, 0)


def _pieced_tiles(problem: GemmProblem) -> Iterable[GemmTile]:
    """Tiles whose width is no power of two, multiplied at once: with the right one a product fills its last wave. Also those of 128 and
    256 columns, which no staging of the result keeps from another stage."""
    shapes: tuple[tuple[int, int, int], ...] = (
        (1, 16, 5), (1, 32, 3), (1, 16, 7), (1, 32, 5), (1, 64, 3),
        (2, 16, 5), (2, 32, 3), (2, 16, 7), (2, 32, 4), (2, 16, 9), (2, 32, 5), (2, 16, 11), (2, 64, 3), (2, 16, 13), (2, 32, 7),
        (2, 64, 4),
    )  # fmt: skip
    if problem.b_kn:  # columns come by 64, the width of a swizzled row
        shapes = ((1, 64, 2), (1, 64, 3), (2, 64, 2), (2, 64, 3), (2, 64, 4))
    for consumers, piece, count in shapes:
        tile = GemmTile(PIECES, False, 64, consumers, piece, piece * (count - 1), 64, MOST_STAGES, 8, 2)
        yield tile
        if consumers == 2 and problem.m > 1024:
            yield replace(tile, group=16)


def _swapped_tiles(problem: GemmProblem) -> Iterable[GemmTile]:
    """Tiles in pieces with the weights in their rows and the tokens, in as few equal parts as fit and in one or two more, in their
    columns: these come by 16, so that little of a tile lies beyond the last token. For few tokens only of a tree whose leaves end
    inside a deep stage, for which the decode kernels would take shallow ones."""
    if not (_some_rows(problem) or _few_of_shallow_leaves(problem)):
        return
    least = -(-problem.m // (WIDEST_TREE if problem.leaves else WIDEST))
    for parts in range(least, least + 3):
        width = -(-problem.m // (16 * parts)) * 16
        piece = min(width & -width, 64)
        for consumers in (1, 2) if width > FEW_ROWS or problem.m <= FEW_ROWS else ():
            yield GemmTile(PIECES, True, 64, consumers, piece, width - piece, 64, MOST_STAGES, 1, 2)


def _few_of_shallow_leaves(problem: GemmProblem) -> bool:
    return problem.leaves == 8 and problem.m <= FEW_ROWS and problem.k // problem.leaves % DEEP > 0


def candidates(problem: GemmProblem, multiprocessors: int = 132) -> list[GemmTile]:
    """Every tile that fits the problem. All of them compute the same bits."""
    aligned = problem.n * problem.out_dtype.itemsize % 16 == 0 and problem.out_dtype.itemsize == 2
    whole = 2 if aligned else 0
    store = whole if problem.experts else min(whole, 1)
    plain = not (problem.experts or problem.a_km or problem.b_kn)
    tiles = [*_decode_tiles(whole), *_wide_tiles(store, whole, problem.m)]
    leaf = problem.k // problem.leaves if problem.leaves else 0
    pieces = aligned and not problem.experts and problem.b_kn >= problem.a_km
    pieces &= problem.m > FEW_ROWS or (plain and _few_of_shallow_leaves(problem))
    pieces &= problem.leaves == 0 or (problem.leaves == 8 and leaf >= LEAST_LEAF)
    if pieces:  # of those predicted alike the first is chosen
        tiles += [*_swapped_tiles(problem), *(_pieced_tiles(problem) if problem.m > FEW_ROWS else [])]
    itemsizes = (problem.dtype.itemsize, problem.out_dtype.itemsize)
    kept = [tile for tile in _skinny_tiles(problem) if plain and tile.fits(*itemsizes, problem.leaves)]
    for shape in tiles:
        if (shape.swap or shape.engine == DIRECT) and not plain:
            continue
        if shape.swap and problem.m > 4 * shape.width:
            continue
        tile = _within_memory(_with_depth(shape, leaf) if leaf else shape, problem)
        if tile is not None:
            kept.append(tile)
    return list(dict.fromkeys(replace(tile, overlap=_usual_overlap(tile, problem, multiprocessors)) for tile in kept))


def _usual_overlap(tile: GemmTile, problem: GemmProblem, multiprocessors: int) -> int:
    """What was fastest most often: a grid that fills the device, or leaves half of it idle, may let the next one start early; one
    in between would crowd the multiprocessors that happen to be idle."""
    tiles = tile_count(tile, problem)
    if tile.engine in (RING, PIECES):
        return 2 if tiles >= multiprocessors else 1
    crowds = multiprocessors < 2 * tiles <= 4 * multiprocessors
    return (0 if tile.engine == SKINNY else 1) if crowds else 2


def tile_count(tile: GemmTile, problem: GemmProblem) -> int:
    """Tiles of a product, at most."""
    rows, cols = (problem.n, problem.m) if tile.swap else (problem.m, problem.n)
    ragged = min(problem.experts, problem.m)  # each expert that has rows may leave one tile partly empty
    return (-(-rows // tile.height) + ragged) * -(-cols // tile.width)


def drips(tile: GemmTile, problem: GemmProblem, multiprocessors: int) -> bool:
    """Whether a chain's finished tile in pieces leaves one piece at each of the next tile's steps: another must follow it, with more
    steps than pieces, or the kernel would wait for loads that never come. With the tokens in columns it spilled and gained nothing."""
    of_its_kind = tile.engine == PIECES and not (tile.swap or problem.leaves)
    return of_its_kind and tile_count(tile, problem) > multiprocessors and -(-problem.k // tile.depth) > tile.pieces


def _within_memory(tile: GemmTile | None, problem: GemmProblem) -> GemmTile | None:
    """The tile with as many of its stages as shared memory holds, or None if that is fewer than three."""
    while tile is not None and not tile.fits(problem.dtype.itemsize, problem.out_dtype.itemsize, problem.leaves):
        tile = replace(tile, stages=tile.stages - 1) if tile.stages > 3 else None
    return tile


def _with_depth(tile: GemmTile, leaf: int) -> GemmTile | None:
    """The tile with the deepest stage that divides a leaf, or None where it has a second column block."""
    if tile.engine == PIECES:
        return tile
    depth = next((d for d in (256, 128, 64, 32, 16) if d <= tile.depth and leaf % d == 0), 0)
    if tile.extra or depth == 0:
        return None
    return replace(tile, depth=depth, stages=min(tile.stages * tile.depth // depth, MOST_STAGES))


@dataclass
class Table:
    """Measured choices: problem key -> M bucket -> tile."""

    gpu: str
    choices: dict[str, dict[int, GemmTile]] = field(default_factory=dict)

    def get(self, problem: GemmProblem) -> GemmTile | None:
        """The measured tile, or None. What was measured of bfloat16 holds for float16."""
        alike = {torch.float16: torch.bfloat16}
        measured = replace(
            problem, dtype=alike.get(problem.dtype, problem.dtype), out_dtype=alike.get(problem.out_dtype, problem.out_dtype)
        )
        return self.choices.get(problem.key, self.choices.get(measured.key, {})).get(problem.bucket)

    def put(self, problem: GemmProblem, tile: GemmTile) -> None:
        """Remember a choice."""
        self.choices.setdefault(problem.key, {})[problem.bucket] = tile

    def to_json(self) -> str:
        """The file's text: one line a key, so that a change reads well in a diff."""
        lines = []
        for key in sorted(self.choices):
            row = {str(m): [int(v) for v in astuple(tile)] for m, tile in sorted(self.choices[key].items())}
            lines.append(f"  {json.dumps(key)}: {json.dumps(row)}")
        body = ",\n".join(lines)
        return f'{{"gpu": {json.dumps(self.gpu)}, "choices": {{\n{body}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        choices = {key: {int(m): _tile_of(values) for m, values in row.items()} for key, row in data["choices"].items()}
        return cls(data["gpu"], choices)

    def save(self, path: Path) -> None:
        """Write the table where MILES_PLAN_KERNEL_TABLE may point."""
        path.write_text(self.to_json())


def _tile_of(values: Sequence[int]) -> GemmTile:
    engine, swap, rows, consumers, cols, extra, depth, stages, group, store, overlap = values
    return GemmTile(engine, bool(swap), rows, consumers, cols, extra, depth, stages, group, store, overlap)


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@lru_cache(maxsize=8)
def table_for(gpu: str) -> Table:
    """The table of the GPU with this name: the user's file if the environment names one, else the shipped one, else empty."""
    if path := os.environ.get(TABLE_VARIABLE):
        return Table.from_json(Path(path).read_text())
    shipped = resources.files(__package__) / "tables" / f"{_slug(gpu)}.json"
    return Table.from_json(shipped.read_text()) if shipped.is_file() else Table(gpu)


@lru_cache(maxsize=4096)
def choose(problem: GemmProblem, gpu: str, multiprocessors: int) -> GemmTile:
    """The tile for a problem: measured if the table has it, else the one predicted fastest for about as many tokens.

    The table's was measured for a power of two of tokens. For fewer, one that is predicted CLEARLY faster takes its place.

    A trainer's micro-batches hold another number of tokens each. Predicting for each would take the host a millisecond a product,
    and every tile that only some of them get is a kernel more to compile.
    """
    measured = table_for(gpu).get(problem)
    if measured is not None and (problem.tokens == problem.bucket or not _some_rows(problem)):
        return measured
    best = _predicted(_for_about_as_many_tokens(problem), multiprocessors)
    if measured is None or CLEARLY * predict_s(best, problem, multiprocessors) < predict_s(measured, problem, multiprocessors):
        return best
    return measured


def _some_rows(problem: GemmProblem) -> bool:
    """Whether a forward product's tokens are so few that its last row tile may be much of it, and more than a decode's smallest."""
    return FEW_ROWS < problem.m <= EXACT_TOKENS and not (problem.experts or problem.a_km or problem.b_kn)


@lru_cache(maxsize=4096)
def _predicted(problem: GemmProblem, multiprocessors: int) -> GemmTile:
    return min(candidates(problem, multiprocessors), key=lambda tile: predict_s(tile, problem, multiprocessors))


def _for_about_as_many_tokens(problem: GemmProblem) -> GemmProblem:
    """The problem with its tokens rounded up to an eighth of an octave. Tiles fit both alike, for what a tile asks of M and K concerns
    few tokens or the tree."""
    return problem.of_tokens(_rounded_up(problem.tokens))


def _rounded_up(tokens: int) -> int:
    if tokens <= EXACT_TOKENS:
        return tokens
    step = 1 << ((tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


def prove(
    run: Callable[[GemmTile], torch.Tensor],
    tiles: Sequence[GemmTile],
    reference: torch.Tensor,
    same: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
) -> list[GemmTile]:
    """The tiles whose result is `reference` bit for bit; `run` computes on the random inputs that gave the reference."""
    return [tile for tile in tiles if same(run(tile), reference)]


def ranked(problem: GemmProblem, multiprocessors: int, keep: int = 6, keep_alike: int = 3) -> list[GemmTile]:
    """The tiles worth timing, best first by prediction: the `keep` fastest of the ring and direct kernels, and `keep_alike` each in
    pieces (many of those are predicted alike), in pieces with the tokens in columns, and skinny; none predicted HOPELESS times slower
    than the fastest."""
    times = {tile: predict_s(tile, problem, multiprocessors) for tile in candidates(problem, multiprocessors)}
    best = min(times.values())
    found: dict[tuple[int, bool], set[GemmTile]] = {}  # of each kind, whatever their order of walking
    kept = []
    for tile in sorted(times, key=lambda tile: times[tile]):
        kind = RING if tile.engine == DIRECT else tile.engine
        alike = found.setdefault((kind, kind == PIECES and tile.swap), set())
        alike.add(replace(tile, group=0))
        if len(alike) <= (keep if kind == RING else keep_alike) and times[tile] <= HOPELESS * best:
            kept.append(tile)
    return kept


def overlaps_of(tile: GemmTile) -> tuple[int, ...]:
    """The ways in which the tile's kernel may be launched."""
    return (0, 2) if tile.engine == SKINNY else (0, 1, 2)


def contenders(problem: GemmProblem, multiprocessors: int, start: GemmTile | None = None) -> list[GemmTile]:
    """What `tune` times: the choice to start from (a table's) and the tiles of `ranked`, the first few of them in every way of
    launching them where the product is short enough for the launch to matter."""
    tiles = list(dict.fromkeys(([start] if start else []) + ranked(problem, multiprocessors)))
    if predict_s(tiles[0], problem, multiprocessors) < LONG_S:
        tiles += [replace(tile, overlap=way) for tile in tiles[:LAUNCHED_IN_EVERY_WAY] for way in overlaps_of(tile)]
    return list(dict.fromkeys(tiles))


def tune(
    problem: GemmProblem,
    run: Callable[[GemmTile], torch.Tensor],
    reference: torch.Tensor,
    time_s: Callable[[Sequence[GemmTile]], dict[GemmTile, float]],
    tiles: Sequence[GemmTile],
    table: Table,
) -> dict[GemmTile, float]:
    """Time those of the tiles (`contenders`) that `prove` lets through, put the fastest into the table and return all times.

    run, reference: as `prove`'s; the reference is the portable kernel's result. time_s: seconds of each tile.
    Raises ValueError if no tile is bit-equal.
    """
    proven = prove(run, tiles, reference)
    if not proven:
        raise ValueError(f"no tile of {problem.key} at {problem.m} rows gives the portable kernel's bits")
    times = time_s(proven)
    table.put(problem, min(times, key=lambda tile: times[tile]))
    return times
