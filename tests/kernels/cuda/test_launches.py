"""Every launch passes what its kernel takes, and the kernels compile for Hopper: on a CPU, where nothing runs.

A slip here costs a run on a GPU.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import miles_plan.kernels.cuda as package
from miles_plan.kernels.cuda.attention_pass import PASS_BYTES
from miles_plan.kernels.cuda.gemm import gemm
from miles_plan.kernels.cuda.shared_addresses import SMALL_BYTES, TENSOR_ALIGNMENT
from miles_plan.kernels.cuda.toolchain import HAVE_GLUON
from miles_plan.kernels.cuda.tuning import (
    BARRIER_BYTES,
    DIRECT,
    PIECES,
    RING,
    SHARED_MEMORY_BYTES,
    GemmProblem,
    GemmTile,
    candidates,
)

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid", "enable_fp_fusion"}
MOST_SPILLED = 8  # registers, by both warp groups, once a tile
HOPPER_ATTENTION = {"attention_kernel", "attention_decode_kernel"}
STAND_INS: dict[str, Any] = {"runs_triton": lambda _: True, "multiprocessors": lambda _: 132}


class Launched(set[str]):
    """Names of the kernels that were launched, and the first launch of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, tuple[Any, tuple[object, ...], dict[str, object]]] = {}


class Recorder:
    """A kernel that checks its arguments as Python binds them, and remembers that it was launched."""

    def __init__(self, kernel: Any, name: str, launched: Launched) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched
        self.parameters: list[str] = list(kernel.arg_names)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*given: object, **keywords: object) -> None:
            named = set(keywords) - OPTIONS
            assert len(given) <= len(self.parameters), (
                f"{self.name} takes {len(self.parameters)} arguments, {len(given)} are given"
            )
            missing = [name for name in self.parameters[len(given) :] if name not in named]
            assert not missing, f"{self.name} is launched without {missing}"
            assert named <= set(self.parameters[len(given) :]), (
                f"{self.name} gets {sorted(named)} after {len(given)} positional ones"
            )
            self.launched.add(self.name)
            self.launched.first.setdefault(self.name, (self.kernel, given, keywords))

        return launch


@pytest.fixture(params=["hopper", "any"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """What is launched on a Hopper GPU or on another one."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton, which knows its kernels' parameters, is not installed")
    if request.param == "hopper" and not HAVE_GLUON:
        pytest.skip("this release of Triton has another Gluon")
    found = Launched()
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    foreign = ("megatron_layers", "sglang_backends")  # subclasses of other packages' classes
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names if name not in foreign]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, jit.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value, name, found))
            elif name in STAND_INS:
                monkeypatch.setattr(module, name, STAND_INS[name])
            elif name in ("runs_gluon", "overlaps"):
                monkeypatch.setattr(module, name, lambda _: request.param == "hopper")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    return found


def half(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=grad)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


def test_matrix_products(launched: Launched) -> None:
    from miles_plan.kernels.cuda.gemm import gemm
    from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
    from miles_plan.kernels.cuda.matmul import matmul, tree_partial
    from miles_plan.kernels.cuda.tuning import GemmProblem, candidates

    for tokens in (1, 40, 300, 3000):
        for order in ("chain", "tree"):
            backward(matmul(half(tokens, 512, grad=True), half(1024, 512, grad=True), order=order, grad_order=order))  # type: ignore[arg-type]  # a literal
        tree_partial(half(tokens, 128), half(256, 128), 2)
        for tile in candidates(GemmProblem(tokens, 1024, 512), 132):
            gemm(half(tokens, 512), half(1024, 512), half(tokens, 1024), tile=tile)
    counts = torch.tensor([30, 0, 34], dtype=torch.int32)
    backward(grouped_matmul(half(64, 256, grad=True), half(3, 128, 256, grad=True), counts))
    assert {"gemm_kernel", "gemm_pieces_kernel"} <= launched or "gemm_portable_kernel" in launched
    assert {"plan_kernel", "weight_gradient_kernel"} <= launched


def test_fp8_products(launched: Launched) -> None:
    from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows

    weight = torch.zeros(2, 256, 256).to(torch.float8_e4m3fn)
    scales = torch.ones(2, 2, 2)
    for tokens in (3, 200):
        values, row_scales = quantize_rows(half(tokens, 256))
        fp8_matmul(values, row_scales, weight[0], scales[0])
        fp8_grouped_matmul(values, row_scales, weight, scales, torch.tensor([tokens, 0], dtype=torch.int32))
    assert "quantize_kernel" in launched
    assert {"fp8_kernel", "fp8_portable_kernel"} & launched


def test_attention(launched: Launched) -> None:
    from miles_plan.kernels.cuda.attention import attention, attention_with_lse

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for d, dv in ((128, 128), (192, 128), (80, 80)):
        backward(attention(half(300, 4, d, grad=True), half(300, 2, d, grad=True), half(300, 2, dv, grad=True), window=100))
        for length in (500, 40_000):
            attention(half(1, 4, d), half(length, 2, d), half(length, 2, dv), kv_lens=ints(length))
    starts, lens = torch.arange(65, dtype=torch.int32), torch.full((64,), 6000, dtype=torch.int32)
    paged = half(100, 64, 8, 128)
    attention(
        half(64, 64, 128),
        paged,
        paged,
        q_starts=starts,
        kv_lens=lens,
        page_table=torch.zeros(64, 94, dtype=torch.int32),
        max_q_len=1,
    )
    attention_with_lse(half(9, 2, 64), half(9, 2, 64), half(9, 2, 64))
    assert {"attention_portable_kernel", "attention_merge_kernel"} <= launched  # for a head size of 80, also on Hopper
    assert launched.isdisjoint(HOPPER_ATTENTION) or launched >= HOPPER_ATTENTION


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(
    ("batch", "length", "split", "parts", "claim", "stages"),
    [
        (1, 4096, True, 2, False, 11),
        (1, 16_384, True, 1, False, 11),
        (1, 32_768, True, 1, True, 6),
        (16, 4096, False, 1, False, 4),
        (24, 4096, False, 1, True, 6),
        (64, 4096, False, 1, True, 4),
    ],
)
def test_how_decode_work_is_cut(
    launched: Launched, batch: int, length: int, split: bool, parts: int, claim: bool, stages: int
) -> None:
    """Few chunks halve the values, many rows are not cut. Of more items than thread blocks one is claimed after the other;
    chunks are then merged by a kernel of their own."""
    from miles_plan.kernels.cuda.attention import attention

    starts = torch.arange(batch + 1, dtype=torch.int32)
    lens = torch.full((batch,), length, dtype=torch.int32)
    keys = torch.empty(batch * length, 8, 128, dtype=torch.bfloat16)
    attention(half(batch, 32, 128), keys, keys, q_starts=starts, kv_lens=lens, max_q_len=1, max_kv_len=length)
    launch = launched.first["attention_decode_kernel"]
    named = {name: launch[2][name] for name in ("SPLIT", "PARTS", "DV", "CLAIM", "STAGES")}
    assert named == {"SPLIT": split, "PARTS": parts, "DV": 128 // parts, "CLAIM": claim, "STAGES": stages}
    assert ("attention_merge_kernel" in launched) == (split and claim)
    program = compiled(*launch)
    assert program.metadata.shared <= SHARED_MEMORY_BYTES
    ptx: str = program.asm["ptx"]
    conditions = re.findall(r"@(%p\d+) atom\.", ptx)
    assert len(conditions) == (2 if claim else split), "to claim (in two places) or to say that a chunk is done"
    if claim:  # else lanes that do not claim would take a way of their own
        assert all(re.search(rf"mov\.pred\s+{condition}, -1;", ptx) for condition in conditions)


ROWS_AND_HEADS = [(1, heads, 1) for heads in (8, 16, 32, 64, 128)] + [(rows, 8, 8) for rows in (1, 8, 16, 32, 33, 64)]
BATCHES = [(1, 500), (1, 2000), (1, 5000), (1, 20_000), (1, 40_000), (8, 2000), (8, 20_000), (64, 500), (64, 3000), (256, 1500)]


def decode_bytes(launch: dict[str, Any]) -> int:
    """What a decode's launch must hold: queries, a pass, its ring, barriers."""
    head = launch["D"] + launch["D_TAIL"]
    return (launch["ROWS"] + launch["STAGES"] * launch["HALF"]) * head * 2 + PASS_BYTES + BARRIER_BYTES


def decodes(launched: Launched, d: int, dv: int) -> Iterator[tuple[Any, tuple[object, ...], dict[str, Any]]]:
    """Decode launches for a head size: all numbers of rows, in one piece, in chunks and in halves of the values."""
    from miles_plan.kernels.cuda.attention import attention

    for (rows, heads, kv_heads), (batch, length) in itertools.product(ROWS_AND_HEADS, BATCHES):
        launched.first.clear()
        starts, lens = torch.arange(batch + 1, dtype=torch.int32) * rows, torch.full((batch,), length, dtype=torch.int32)
        keys, values = (torch.empty(length, kv_heads, size, dtype=torch.bfloat16) for size in (d, dv))
        q = torch.empty(batch * rows, heads, d, dtype=torch.bfloat16)
        attention(q, keys, values, q_starts=starts, kv_lens=lens, max_q_len=rows, max_kv_len=length)
        yield launched.first["attention_decode_kernel"]


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (192, 128)])
def test_every_decode_fits_shared_memory(launched: Launched, d: int, dv: int) -> None:
    """With a ring for a block's keys and values, which are halved: 64 rows leave wide heads less room."""
    for _, _, launch in decodes(launched, d, dv):
        asked = {name: launch[name] for name in ("SPLIT", "CLAIM", "PARTS", "ROWS", "STAGES", "DV")}
        assert launch["STAGES"] >= 4, asked
        assert decode_bytes(launch) <= SHARED_MEMORY_BYTES, asked
        assert launch["DV"] * launch["PARTS"] == dv


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(("d", "dv"), [(128, 128), (192, 128)])
def test_a_decode_asks_for_no_more_shared_memory_than_is_counted(launched: Launched, d: int, dv: int) -> None:
    largest: dict[tuple[int, ...], tuple[Any, tuple[object, ...], dict[str, Any]]] = {}
    for launch in decodes(launched, d, dv):
        kind = tuple(launch[2][name] for name in ("SPLIT", "CLAIM", "PARTS"))
        if kind not in largest or decode_bytes(launch[2]) > decode_bytes(largest[kind][2]):
            largest[kind] = launch
    assert {kind[:2] for kind in largest} == set(itertools.product((False, True), (False, True)))
    for kernel, given, keywords in largest.values():
        assert shared_bytes(kernel, given, keywords) <= decode_bytes(keywords)


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(("d", "dv"), [(80, 80), (192, 128), (192, 192), (256, 256), (576, 512)])
def test_the_widest_heads_of_each_kind_fit_shared_memory(launched: Launched, d: int, dv: int) -> None:
    """Prefill, pages that no copy engine takes, a decode in chunks and their merge, gradients."""
    from miles_plan.kernels.cuda.attention import attention

    q, k, v = half(300, 4, d, grad=True), half(300, 2, d, grad=True), half(300, 2, dv, grad=True)
    backward(attention(q, k, v))
    launches = list(launched.first.items())
    launched.first.clear()
    lens, table = torch.full((1,), 3000, dtype=torch.int32), torch.zeros(1, 63, dtype=torch.int32)
    attention(half(1, 4, d), half(63, 48, 2, d), half(63, 48, 2, dv), kv_lens=lens, page_table=table)
    attention(half(1, 4, d), half(3000, 2, d), half(3000, 2, dv), kv_lens=lens)
    for name, launch in [*launches, *launched.first.items()]:
        assert shared_bytes(*launch) <= SHARED_MEMORY_BYTES, name


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
def test_pages_cost_a_decode_neither_launches_nor_sums(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys begin is added up for packed ones alone, and a box's page number is one shuffle, not a sum over lanes."""
    from miles_plan.kernels.cuda.attention import attention

    sums = []
    monkeypatch.setattr(torch, "cumsum", lambda x, *_, **__: sums.append(x) or torch.zeros_like(x))
    starts, lens = torch.arange(3, dtype=torch.int32), torch.full((2,), 4096, dtype=torch.int32)
    given: dict[str, Any] = {"q_starts": starts, "kv_lens": lens, "max_q_len": 1, "max_kv_len": 4096}
    shuffles = []
    for table in (None, torch.zeros(2, 64, dtype=torch.int32)):
        keys = torch.empty(*((8192,) if table is None else (128, 64)), 8, 128, dtype=torch.bfloat16)
        launched.first.clear()
        attention(half(2, 32, 128), keys, keys, page_table=table, **given)
        ptx: str = compiled(*launched.first["attention_decode_kernel"]).asm["ptx"]
        shuffles.append((ptx.count("shfl.sync.bfly"), ptx.count("shfl.sync.idx")))
        assert len(sums) == 1
    (sums_of_packed, picks_of_packed), (sums_of_paged, picks_of_paged) = shuffles
    assert sums_of_paged == sums_of_packed
    assert picks_of_paged == picks_of_packed + 2, "one of keys, one of values"


def test_rows(launched: Launched) -> None:
    from miles_plan.kernels.cuda.embedding import embedding
    from miles_plan.kernels.cuda.expert_rows import expert_order, expert_rows
    from miles_plan.kernels.cuda.log_prob import combine_log_prob, log_prob, log_softmax
    from miles_plan.kernels.cuda.moe_combine import moe_combine
    from miles_plan.kernels.cuda.rms_norm import rms_norm
    from miles_plan.kernels.cuda.rope import CacheRows, rope
    from miles_plan.kernels.cuda.router import router
    from miles_plan.kernels.cuda.sample import sample
    from miles_plan.kernels.cuda.swiglu import swiglu

    y, total = rms_norm(half(9, 256, grad=True), half(256, grad=True), 1e-6, half(9, 256, grad=True))
    backward(y, total)
    rms_norm(half(9, 256), half(256))
    backward(swiglu(half(9, 256, grad=True)))
    table, at = torch.zeros(30, 32), torch.zeros(9, dtype=torch.int64)
    backward(*rope(half(9, 4, 64, grad=True), half(9, 2, 64, grad=True), table, table, at))
    rope(half(9, 4, 64), half(9, 2, 64), table, table, at, q_norm=half(64), k_norm=half(64))
    rope(
        half(9, 4, 64), half(9, 2, 64), table, table, at, cache=CacheRows(half(20, 2, 64), half(20, 2, 64), half(9, 2, 64), at)
    )
    backward(embedding(at, half(40, 64, grad=True)))
    logits = torch.zeros(9, 16, requires_grad=True)
    backward(router(logits, 4)[0])
    router(logits.detach(), 4, ids=torch.zeros(9, 4, dtype=torch.int32), groups=4, groups_kept=2, bias=torch.zeros(16))
    index = torch.zeros(9, 2, dtype=torch.int32)
    backward(moe_combine(half(18, 64, grad=True), index, torch.zeros(9, 2, requires_grad=True)))
    backward(expert_rows(half(9, 64, grad=True), expert_order(torch.zeros(9, 2, dtype=torch.int64), 3)))
    sample(half(9, 5000), at, at, top_p=0.9)
    sample(half(9, 5000), at, at, temperature=torch.ones(9))
    log_prob(half(9, 4096), at, temperature=torch.ones(9))
    backward(log_prob(half(9, 4096, grad=True), at))
    log_prob(half(9, 1024), at, vocab_size=4096)
    backward(log_softmax(half(9, 4096, grad=True)))
    combine_log_prob(torch.zeros(9, 16), torch.zeros(9, 16), torch.zeros(9))
    assert {
        "rms_norm_kernel", "rms_norm_gradient_kernel", "ordered_sum_kernel", "swiglu_kernel", "swiglu_gradient_kernel",
        "rope_kernel", "embedding_kernel", "embedding_gradient_kernel", "router_kernel", "router_gradient_kernel",
        "combine_kernel",
        "combine_gradient_kernel", "sample_kernel", "partial_kernel", "chosen_kernel", "shift_kernel", "gradient_kernel",
        "table_gradient_kernel",
    } <= launched  # fmt: skip


def test_scores_of_a_vocabulary(launched: Launched) -> None:
    from miles_plan.backends.training.scores import VocabParallelScores

    apply: Any = VocabParallelScores.apply
    for rows, columns in ((9, 4096), (1, 300)):
        backward(*apply(half(rows, columns, grad=True), torch.zeros(rows, dtype=torch.int64), 0, columns - 1, 0.7, None))
    assert {"statistics_kernel", "scores_gradient_kernel"} <= launched


@pytest.mark.slow
def test_a_launch_of_each_kernel_compiles_for_hopper(launched: Launched) -> None:
    test_matrix_products(launched)
    test_fp8_products(launched)
    test_attention(launched)
    test_rows(launched)
    test_scores_of_a_vocabulary(launched)
    for kernel, given, keywords in launched.first.values():
        assert shared_bytes(kernel, given, keywords) <= SHARED_MEMORY_BYTES, kernel


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize("leaves", [0, 8])
def test_a_tile_asks_for_no_more_shared_memory_than_is_counted(launched: Launched, leaves: int) -> None:
    """Of each kernel and way of storing, the tiles that are said to need most."""
    from miles_plan.kernels.cuda.tuning import GemmProblem, candidates

    largest: dict[tuple[object, ...], tuple[int, GemmProblem, GemmTile]] = {}
    for m, out_dtype, b_kn in itertools.product((16, 700), (torch.bfloat16, torch.float32), (False, True)):
        problem = GemmProblem(m, 6144, 2048, out_dtype=out_dtype, leaves=leaves, b_kn=b_kn)
        for tile in candidates(problem):
            counted = tile.shared_bytes(2, out_dtype.itemsize, leaves)
            kind = (tile.engine, tile.store, tile.extra > 0, tile.stashes(leaves))
            largest[kind] = max(largest.get(kind, (0, problem, tile)), (counted, problem, tile), key=lambda one: one[0])
    for counted, problem, tile in largest.values():
        launched.first.clear()
        b = half(2048, 6144) if problem.b_kn else half(6144, 2048)
        gemm(half(problem.m, 2048), b, half(problem.m, 6144).to(problem.out_dtype), leaves=leaves, b_kn=problem.b_kn, tile=tile)
        (launch,) = launched.first.values()
        assert shared_bytes(*launch) <= counted <= SHARED_MEMORY_BYTES, tile


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize("leaves", [0, 8])
def test_the_ring_of_pieces_lies_first_in_shared_memory(launched: Launched, leaves: int) -> None:
    problem = GemmProblem(512, 7168, 2048, leaves=leaves)
    tile = next(tile for tile in candidates(problem) if tile.engine == PIECES and tile.width == 112)
    gemm(half(512, 2048), half(7168, 2048), half(512, 7168), leaves=leaves, tile=tile)
    text = compiled(*launched.first["gemm_pieces_kernel"]).asm["llir"]
    ring = tile.stages * (tile.height + tile.width) * tile.depth * 2
    others = [int(offset) for offset in re.findall(r"@global_smem, i(?:32|64) (\d+)", text)]
    assert others
    assert min(others) >= ring


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(
    ("problem", "width"),
    [
        (GemmProblem(4096, 6144, 4096, b_kn=True), 256), (GemmProblem(4096, 6144, 1408, leaves=8, b_kn=True), 128),
        (GemmProblem(4096, 7168, 2048, leaves=8), 112), (GemmProblem(256, 7168, 2048, leaves=8), 112),
        (GemmProblem(512, 4096, 4096, leaves=8), 128), (GemmProblem(256, 5120, 2048), 80),
    ],
)  # fmt: skip
def test_the_sums_of_a_tile_in_pieces_stay_in_registers(launched: Launched, problem: GemmProblem, width: int) -> None:
    """And the matrix unit runs dry at a tile's end alone, not where the left half of a tree ends."""
    tile = next(tile for tile in candidates(problem) if tile.engine == PIECES and (tile.consumers, tile.width) == (2, width))
    operand = half(problem.k, problem.n) if problem.b_kn else half(problem.n, problem.k)
    out = half(problem.m, problem.n)
    gemm(half(problem.m, problem.k), operand, out, leaves=problem.leaves, b_kn=problem.b_kn, tile=tile)
    launch = launched.first["gemm_pieces_kernel"]
    assert shared_bytes(*launch) <= tile.shared_bytes(2, 2, problem.leaves) <= SHARED_MEMORY_BYTES
    code = machine_code(compiled(*launch))
    assert "STL" not in code
    assert code.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == 2, "each warp group empties the matrix unit once a tile"
    assert code.count("WARPGROUP.DEPBAR.LE gsb0, 0x1") >= (30 if problem.leaves else 4)


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(
    ("problem", "consumers", "width"),
    [
        (GemmProblem(200, 34_816, 5120), 2, 208), (GemmProblem(130, 5120, 2880), 1, 144),
        (GemmProblem(200, 5120, 2048, leaves=8), 2, 112), (GemmProblem(72, 4096, 2048, leaves=8), 1, 80),
        (GemmProblem(3, 4096, 13_696, leaves=8), 1, 16),
    ],
)  # fmt: skip
def test_a_tile_with_the_tokens_in_its_columns_is_multiplied_at_once_and_stored_whole(
    launched: Launched, problem: GemmProblem, consumers: int, width: int
) -> None:
    tiles = [tile for tile in candidates(problem) if tile.engine == PIECES and tile.swap]
    tile = next(tile for tile in tiles if (tile.consumers, tile.width) == (consumers, width))
    out = half(problem.m, problem.n)
    gemm(half(problem.m, problem.k), half(problem.n, problem.k), out, leaves=problem.leaves, tile=tile)
    launch = launched.first["gemm_pieces_kernel"]
    assert shared_bytes(*launch) <= tile.shared_bytes(2, 2, problem.leaves) <= SHARED_MEMORY_BYTES
    program = compiled(*launch)
    assert "st.global.v4" in program.asm["ptx"]
    assert "st.global.b16" not in program.asm["ptx"]
    code = machine_code(program)
    assert code.count("STL") <= (MOST_SPILLED if width == 112 else 0), "with Triton 3.7; none with 3.6"
    assert set(re.findall(r"HGMMA\.64x(\d+)x16", code)) == {str(width)}
    assert code.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == consumers, "each warp group empties the matrix unit once a tile"


def test_the_direct_kernel_waits_for_every_warp_before_it_lays_a_tile_out_anew(launched: Launched) -> None:
    """Triton puts the memory that takes into the ring's, and no barrier of its own before a product of another warp."""
    tile = GemmTile(DIRECT, False, 64, 2, 128, 0, 64, 6, 8, 2)
    gemm(half(300, 2048), half(512, 2048), half(300, 512), tile=tile)
    if "gemm_direct_kernel" not in launched:
        pytest.skip("not launched on this GPU")
    ptx: str = compiled(*launched.first["gemm_direct_kernel"]).asm["ptx"]
    end = ptx[ptx.rindex("wgmma.wait_group.sync.aligned") :]
    assert end.index("bar.sync") < end.index("st.shared")


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        ("gemm_kernel", GemmTile(RING, False, 64, 2, 128, 0, 64, 5, 8, 2)),
        ("gemm_direct_kernel", GemmTile(DIRECT, False, 64, 2, 128, 0, 64, 6, 8, 2)),
    ],
)
def test_whole_rows_are_stored_sixteen_bytes_at_a_time(launched: Launched, kernel: str, tile: GemmTile) -> None:
    """Also where the last tile begins further left, to end inside the matrix."""
    gemm(half(300, 2048), half(720, 2048), half(300, 720), tile=tile)
    ptx: str = compiled(*launched.first[kernel]).asm["ptx"]
    assert "st.global.v4" in ptx
    assert "st.global.b16" not in ptx


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
def test_prefill_computes_weights_while_the_tensor_core_multiplies_values(launched: Launched) -> None:
    """The assembler is free to wait for the values first, which would cost speed and no bit, or to keep scores in memory."""
    from miles_plan.kernels.cuda.attention import attention

    attention(half(300, 32, 128), half(300, 8, 128), half(300, 8, 128))
    code = machine_code(compiled(*launched.first["attention_kernel"]))
    scores, values = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    inner, edge = code.split(scores)[1:]  # one loop for both warp groups, and its step for blocks at a sequence's edge
    assert values in edge
    straight = inner[: inner.index("BRA")]
    before, after = straight.split(values)
    assert before.count("MUFU.EX2") >= 4
    assert after.count("MUFU.EX2") >= 16
    assert straight.count("MUFU.EX2") >= 64
    assert after.count("FMUL") >= 64  # rescaled beside the other exponentials
    assert "LDL" not in straight


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(10, 2, 128), (4, 4, 192), (128, 1, 64)])
def test_prefill_compiles_for_groups_that_tma_copies_and_others(
    launched: Launched, heads: int, kv_heads: int, head_size: int
) -> None:
    from miles_plan.kernels.cuda.attention import attention

    values = half(300, kv_heads, min(head_size, 128))
    attention(half(300, heads, head_size), half(300, kv_heads, head_size), values)
    assert shared_bytes(*launched.first["attention_kernel"]) <= SHARED_MEMORY_BYTES
    program = compiled(*launched.first["attention_kernel"])
    turns = re.split(r"bar\.sync barrier, 256", program.asm["ptx"])[1:]
    assert len(turns) == 2  # in the inner loop and in its step for a block at a sequence's edge
    for turn in turns:  # a barrier of both warp groups while one has its turn would never open
        assert "bar.sync" not in turn[: turn.index("bar.arrive barrier, 256")]
    begin = program.asm["ptx"][: program.asm["ptx"].index("mbarrier.init")]
    asked = [int(place) for place in re.findall(r"ld\.shared\.b32\s+%r\d+, \[global_smem\+(\d+)\]", begin)]
    assert len(asked) >= 5
    first_marked = (program.metadata.shared & -8) - SMALL_BYTES
    assert all(place % TENSOR_ALIGNMENT == 0 or (place >= first_marked and place % 8 == 0) for place in asked)


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
def test_values_whose_heads_lie_apart_are_laid_together(launched: Launched) -> None:
    """Megatron splits one product into queries, keys and values, of which the values stay a view."""
    from miles_plan.kernels.cuda.attention import attention

    mixed = half(300, 2, 4 * 128, grad=True)
    q, k, v = mixed[..., :256].reshape(300, 4, 128), mixed[..., 256:384].contiguous(), mixed[..., 384:]
    assert not v.is_contiguous()
    backward(attention(q, k, v))
    assert "attention_kernel" in launched
    assert "attention_portable_kernel" not in launched
    attention(half(300, 4, 128), half(300, 2, 128), half(300, 2, 129)[..., :128])
    assert "attention_portable_kernel" not in launched


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
@pytest.mark.parametrize("width", [1000, 4096])
@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_loads_first_thing_after_its_wait(launched: Launched, width: int, residual: bool) -> None:
    """Addresses stand before the wait, and no load behind arithmetic that waits for another."""
    from miles_plan.kernels.cuda.rms_norm import rms_norm

    rms_norm(half(9, width), half(width), 1e-6, half(9, width) if residual else None)
    code = machine_code(compiled(*launched.first["rms_norm_kernel"]))
    waited, released = code.index("ACQBULK"), code.index("PREEXIT")
    loads = [match.start() for match in re.finditer(r"\bLDG\.", code)]
    assert len(loads) >= 4 + 2 * residual
    assert all(waited < load < released for load in loads)
    assert code[waited : loads[0]].count(";") <= 3
    assert "LDL" not in code


@pytest.mark.parametrize("launched", ["hopper"], indirect=True)
def test_a_rotation_waits_for_memory_twice(launched: Launched) -> None:
    """For the position, with the heads and their norm's weights beside it, and for the angles at that position."""
    from miles_plan.kernels.cuda.rope import rope

    table, at = torch.zeros(30, 64), torch.zeros(9, dtype=torch.int64)
    rope(half(9, 8, 128), half(9, 8, 128), table, table, at, q_norm=half(128), k_norm=half(128))
    code = machine_code(compiled(*launched.first["rope_kernel"]))
    for branch in code.split("ACQBULK")[1:]:
        first, second = branch.split("STG")[0].split("PREEXIT")
        assert len(re.findall(r"\bLDG\.", first)) == 7  # position, four pieces of heads, two of weights
        angles = list(re.finditer(r"\bLDG\.", second))
        assert len(angles) == 2
        assert "LDS" not in second[: angles[1].start()]


def machine_code(program: Any) -> str:
    """A compiled launch, disassembled."""
    tools = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent / "bin"
    if not (tools / "nvdisasm").exists():
        pytest.skip("this build of Triton has no disassembler")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        return subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def shared_bytes(kernel: Any, given: tuple[object, ...], keywords: dict[str, object]) -> int:
    """The shared memory that a launch asks for on an H200."""
    return int(compiled(kernel, given, keywords).metadata.shared)


def compiled(kernel: Any, given: tuple[object, ...], keywords: dict[str, object]) -> Any:
    """A launch compiled as Triton would on an H200."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    hopper = GPUTarget("cuda", 90, 32)
    backend = make_backend(hopper)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*given, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return compile(source, target=hopper, options=options.__dict__)
