"""Softmax attention whose bits depend only on the sequence: decode, chunked prefill and training forward agree.

Packed sequences over packed or paged keys and values, grouped-query heads, causal and sliding-window masks, value heads of
another size than key heads (MLA). `attention_kernel` states the arithmetic; sources are named there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from . import arguments
from .attention_backward import attention_gradients
from .attention_decode import attention_decode_kernel
from .attention_kernel import BLOCK_KEYS, EMPTY, TILE_ROWS, attention_kernel
from .attention_pass import HALF_KEYS, PASS_BYTES, PASS_ROWS, layout_of_scores
from .attention_portable import attention_merge_kernel, attention_portable_kernel
from .attention_work import MOST_STAGES
from .device import multiprocessors, runs_gluon, runs_triton
from .gemm import descriptor
from .named_barrier import MOST_STAGES as MOST_NAMED_STAGES
from .overlap import overlap, overlaps
from .toolchain import gl, gluon_descriptor
from .tuning import BARRIER_BYTES, SHARED_MEMORY_BYTES
from .workspace import zeroed_ints

SPLIT_BELOW = 0.75  # rows of decode tiles a multiprocessor; with more, each is computed whole and not in chunks
DECODE_WARPS = 4  # that compute, of a thread block
RING_BYTES = 60 * 1024  # a multiprocessor, of keys and values on their way while all stream; rounded up to whole blocks
RING_MORE_BYTES = 32 * 1024  # for pages, and again for chunks
HALVE_VALUES_UP_TO = 0.25  # split work items a multiprocessor; with so few, two thread blocks take half the values each
L2_BYTES = 32 * 2**20  # of keys and values that prefill works on at a time
CHUNK_KEYS = 1024  # keys after which the running state restarts; what a split decode computes alone
LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16)
NO_WINDOW = 2**30
VALUE_SIZES = (16, 32, 64, 80, 96, 128, 192, 256, 512)
HEAD_SIZES = (*VALUE_SIZES, 576)


@dataclass(frozen=True)
class _Call:
    """One attention call, checked: tensors and what the kernels need to know about them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_starts: torch.Tensor
    kv_starts: torch.Tensor
    kv_lens: torch.Tensor
    table: torch.Tensor | None
    max_q_len: int
    max_kv_len: int
    causal: bool
    window: int
    scale: float

    @property
    def seqs(self) -> int:
        return self.kv_lens.numel()

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def page(self) -> int:
        """Keys a page, 0 for packed keys."""
        return self.k.shape[1] if self.table is not None else 0

    @cached_property
    def head_tiles(self) -> int:
        """Tiles a key head's group is cut into: a group of more than 64 heads does not fit one tile."""
        group = self.heads // self.kv_heads
        return next(t for t in range(1, group + 1) if group % t == 0 and group // t <= TILE_ROWS)

    @property
    def group(self) -> int:
        """Query heads that share a tile."""
        return self.heads // self.kv_heads // self.head_tiles

    @property
    def chunks(self) -> int:
        return max(1, -(-self.max_kv_len // CHUNK_KEYS))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_starts: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    kv_lens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of packed queries; returns [tokens, heads, value size] in q's dtype. Differentiable for packed keys.

    q: [tokens, heads, D], bf16 or fp16, last dimension contiguous; sequence i owns tokens q_starts[i] .. q_starts[i + 1].
    k, v: packed [keys, kv_heads, D or DV], sequence i owning kv_lens[i] keys from kv_starts[i]; or, with page_table
        [sequences, pages] int32, paged [pages, page size, kv_heads, D or DV]. heads is a multiple of kv_heads.
    q_starts: int32 [sequences + 1]; None is one sequence. kv_starts, kv_lens: int32 [sequences]; None means q's own. kv_starts is
        not used with a page table.
    A sequence's queries are its last ones: query j of n stands at position kv_len - n + j, so prefill, a later chunk and a
    decode step (n = 1) need no further argument. kv_len must be at least n.
    max_q_len, max_kv_len: upper bounds, known without reading the device; None reads them (a synchronisation).
    causal: a query sees keys up to its own position. window: and only the last `window` of them. scale: default D ** -0.5.

    Order of the sum: keys in ascending blocks of 128, restarting every 1024, as `attention_kernel` states; it never depends
    on the batch, the tile, the page size, or where the prefill was cut.

    Raises ValueError naming the argument for a wrong dtype, shape, stride, device or head size.
    """
    call = _check(q, k, v, q_starts, kv_starts, kv_lens, page_table, max_q_len, max_kv_len, causal, window, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        if page_table is not None:
            raise ValueError("page_table is given with inputs that require gradients; allowed: packed keys for training")
        return _Attention.apply(q, k, v, call)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    out, _ = _forward(call, want_lse=False)
    return out


def attention_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and the natural log-sum-exp of each row's scaled scores, float32 [tokens, heads]; no gradients."""
    take = keywords.pop
    call = _check(
        q, k, v, take("q_starts", None), take("kv_starts", None), take("kv_lens", None), take("page_table", None),
        take("max_q_len", None), take("max_kv_len", None), take("causal", True), take("window", None), take("scale", None),
    )  # fmt: skip
    if keywords:
        raise ValueError(f"{next(iter(keywords))} is not an argument; allowed: those of attention()")
    out, lse = _forward(call, want_lse=True)
    return out, lse / LOG2_E


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor | None, kv_starts: torch.Tensor | None,
    kv_lens: torch.Tensor | None, table: torch.Tensor | None, max_q_len: int | None, max_kv_len: int | None, causal: bool,
    window: int | None, scale: float | None,
) -> _Call:  # fmt: skip
    _check_tensors(q, k, v, table)
    device = arguments.require_same_device(
        q=q, k=k, v=v, q_starts=q_starts, kv_starts=kv_starts, kv_lens=kv_lens, page_table=table
    )
    for name, given in (("q_starts", q_starts), ("kv_starts", kv_starts), ("kv_lens", kv_lens)):
        if given is not None:
            arguments.require_dtype(name, given, (torch.int32,))
            arguments.require_dims(name, given, 1, "[sequences + 1]" if name == "q_starts" else "[sequences]")
            arguments.require_contiguous(name, given)
    if q_starts is None:
        q_starts = torch.tensor([0, q.shape[0]], device=device, dtype=torch.int32)
        max_q_len = q.shape[0] if max_q_len is None else max_q_len
    if kv_lens is None:
        if table is not None:
            raise ValueError("kv_lens is None with a page_table; allowed: an int32 tensor [sequences]")
        kv_lens = (q_starts[1:] - q_starts[:-1]).contiguous()
        max_kv_len = max_q_len if max_kv_len is None else max_kv_len
        kv_starts = q_starts[:-1].contiguous() if kv_starts is None else kv_starts
    if kv_starts is None:
        # Pages say where keys begin; what would be added up for nothing takes two launches, more than a short decode can hide.
        kv_starts = torch.cumsum(kv_lens, 0, dtype=torch.int32) - kv_lens if table is None else kv_lens
    arguments.require_shape("q_starts", q_starts, (kv_lens.numel() + 1,), "[sequences + 1]")
    arguments.require_shape("kv_starts", kv_starts, (kv_lens.numel(),), "[sequences]")
    if table is not None:
        arguments.require_shape("page_table", table, (kv_lens.numel(), table.shape[1]), "[sequences, pages]")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; allowed: at least 1, or None")
    if max_q_len is None:
        max_q_len = int((q_starts[1:] - q_starts[:-1]).max())
    if max_kv_len is None:
        max_kv_len = int(kv_lens.max())
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale is {scale}; allowed: a positive number")
    return _Call(q, k, v, q_starts, kv_starts, kv_lens, table, max_q_len, max_kv_len, causal, window or NO_WINDOW, scale)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor | None) -> None:
    arguments.require_dims("q", q, 3, "[tokens, heads, D]")
    meaning = "[keys, kv_heads, D]" if table is None else "[pages, page size, kv_heads, D]"
    for name, tensor in (("k", k), ("v", v)):
        arguments.require_dims(name, tensor, 3 if table is None else 4, meaning)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments.require_dtype(name, tensor, DTYPES)
        arguments.require_contiguous_rows(name, tensor)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: q's, {q.dtype}")
        arguments.require_size(f"the head size of {name}", tensor.shape[-1], VALUE_SIZES if name == "v" else HEAD_SIZES)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head size {k.shape[-1]}; allowed: q's, {q.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {list(v.shape)}; allowed: k's up to the head size, {list(k.shape[:-1])}")
    if q.shape[1] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[1]} heads; allowed: a multiple of k's, {k.shape[-2]}")
    if table is not None:
        arguments.require_dtype("page_table", table, (torch.int32,))
        arguments.require_dims("page_table", table, 2, "[sequences, pages]")
        arguments.require_contiguous_rows("page_table", table)
        arguments.require_contiguous("k", k)
        arguments.require_contiguous("v", v)


def split_head(d: int) -> tuple[int, int]:
    """A head size as a power of two and a tail: 192 = 128 + 64, 576 = 512 + 64; sizes that pad instead have no tail."""
    return (d - 64, 64) if d in (192, 576) else (d, 0)


def _forward(call: _Call, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q, device = call.q, call.q.device
    out = torch.empty(*q.shape[:2], call.v.shape[-1], device=device, dtype=q.dtype)
    lse = torch.empty(q.shape[:2] if want_lse else (1, 1), device=device, dtype=torch.float32)
    if q.shape[0] == 0:
        return out, lse
    if not runs_triton(device):
        return attention_reference(call)
    if _hopper_runs(call):
        _launch_hopper(call, out, lse, want_lse)
    else:
        _launch_portable(call, out, lse, want_lse)
    return out, lse


def _hopper_runs(call: _Call) -> bool:
    """What the warp-specialised kernel is built for; everything else goes to the portable one, with the same bits."""
    d, dv, page = call.q.shape[-1], call.v.shape[-1], call.page
    sizes = (d, dv) in ((64, 64), (128, 128), (192, 128))
    pages = page == 0 or page % BLOCK_KEYS == 0 or (page >= 8 and BLOCK_KEYS % page == 0)
    views = call.table is None or all(_rows_view(x) is not None for x in (call.k, call.v))
    aligned = all(x.data_ptr() % 16 == 0 for x in (call.q, call.k, call.v)) and all(s % 8 == 0 for s in call.q.stride()[:2])
    return runs_gluon(call.q.device) and sizes and pages and views and aligned


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """Packed keys or values with a token's heads side by side, as TMA copies them: a trainer's values are a part of the product of
    queries, keys and values, where they lie apart. The copy takes far less than the portable kernel takes more."""
    return x if _rows_view(x) is not None else x.contiguous()


def _rows_view(x: torch.Tensor) -> torch.Tensor | None:
    """Keys or values as [rows, kv_heads * D], or None where the strides do not allow it."""
    flat = x.flatten(0, 1) if x.dim() == 4 else x
    if flat.stride(-1) != 1 or flat.stride(1) != flat.shape[2] or flat.stride(0) % 8:
        return None
    return flat.as_strided((flat.shape[0], flat.shape[1] * flat.shape[2]), (flat.stride(0), 1), flat.storage_offset())


def _launch_hopper(call: _Call, out: torch.Tensor, lse: torch.Tensor, want_lse: bool) -> None:
    if call.table is None:
        call = replace(call, k=_heads_together(call.k), v=_heads_together(call.v))
    q = call.q
    d, tail = split_head(q.shape[-1])
    dv, page = call.v.shape[-1], call.page
    tokens = TILE_ROWS // call.group
    places = (*q.stride()[:2], *out.stride()[:2], lse.stride(0))
    options = {
        "CAUSAL": call.causal, "GROUP": call.group, "HEAD_TILES": call.head_tiles, "TOKENS": tokens, "CHUNK": CHUNK_KEYS,
        "PAGE": page, "D": d, "D_TAIL": tail, "DV": dv, "LSE": want_lse, "maxnreg": 168,
        "launch_pdl": overlaps(q.device),
    }  # fmt: skip
    launch = _launch_decode if call.max_q_len <= tokens else _launch_prefill
    launch(call, out, lse, places, options)


def _boxes(call: _Call, keys: int, dv: int) -> tuple[int, tuple[Any, Any, Any]]:
    """Keys a box that TMA copies, of at most `keys` and one page, and the descriptors of keys, their tail, and values `dv` wide."""
    k_rows, v_rows = _rows_view(call.k), _rows_view(call.v)
    assert k_rows is not None
    assert v_rows is not None
    d, tail = split_head(call.q.shape[-1])
    box = min(call.page or keys, keys)
    k_desc = descriptor(k_rows, (box, d))
    return box, (k_desc, descriptor(k_rows, (box, tail)) if tail else k_desc, descriptor(v_rows, (box, dv)))


def _keys_of(call: _Call) -> tuple[Any, ...]:
    """Where each sequence's queries and keys lie, as both Hopper kernels take it."""
    table = call.kv_lens if call.table is None else call.table
    return call.q_starts, call.kv_starts, call.kv_lens, table, 0 if call.table is None else call.table.stride(0)


def _stages(fixed_bytes: int, d: int, dv: int) -> int:
    """Blocks of keys and values that fit beside what else is in shared memory."""
    return min(6, (SHARED_MEMORY_BYTES - BARRIER_BYTES - fixed_bytes) // ((d + dv) * 2 * BLOCK_KEYS))


def _launch_prefill(
    call: _Call, out: torch.Tensor, lse: torch.Tensor, places: tuple[int, ...], options: dict[str, Any]
) -> None:
    heads = call.kv_heads * call.head_tiles
    items = (call.q.shape[0] // (2 * options["TOKENS"]) + call.seqs) * heads
    programs = min(items, multiprocessors(call.q.device))
    box, descs = _boxes(call, BLOCK_KEYS, options["DV"])
    options = {**options, "BN": BLOCK_KEYS, "BOX": box}
    # Totals wait for the end of a chunk in shared memory, or in memory where two stages would no longer fit (D = 192).
    rows, d, dv = 2 * TILE_ROWS, call.q.shape[-1], options["DV"]
    query_bytes, total_bytes = rows * d * 2, rows * dv * 4
    shared = query_bytes + total_bytes + 2 * (d + dv) * 2 * BLOCK_KEYS <= SHARED_MEMORY_BYTES - BARRIER_BYTES
    kept = lse if shared else torch.empty(programs, rows, dv, device=call.q.device, dtype=torch.float32)
    stages = _stages(query_bytes + total_bytes if shared else query_bytes, d, dv)
    l2_keys = L2_BYTES * call.head_tiles // ((d + dv) * call.k.element_size())
    attention_kernel[(programs,)](
        *_queries_of(call, options), call.q, *descs, out, lse, kept, zeroed_ints(call.q.device, 1), *_keys_of(call), call.seqs, heads, items,
        l2_keys, *places, call.scale * LOG2_E, call.window, STAGES=min(stages, MOST_NAMED_STAGES), SHARED=shared,
        Q_BOXES=_in_boxes(call), num_warps=8, **options,
    )  # fmt: skip


def _in_boxes(call: _Call) -> bool:
    """Whether a tile's rows of Q are a box that TMA copies: its sizes are powers of two."""
    return TILE_ROWS % call.group == 0


def _queries_of(call: _Call, options: dict[str, Any]) -> tuple[Any, Any]:
    """Q as the prefill kernel takes it: boxes of a tile's tokens and heads, the head size's body and its tail, or the tensor."""
    if not _in_boxes(call):
        return call.q, call.q
    boxes = [[options["TOKENS"], call.group, columns] for columns in (options["D"], options["D_TAIL"] or options["D"])]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    body, tail = (gluon_descriptor(call.q, list(call.q.shape), list(call.q.stride()), box, layout) for box in boxes)
    return body, tail


def _launch_decode(call: _Call, out: torch.Tensor, lse: torch.Tensor, places: tuple[int, ...], options: dict[str, Any]) -> None:
    sms = multiprocessors(call.q.device)
    heads = call.kv_heads * call.head_tiles
    # Splitting pays while whole rows would leave multiprocessors idle, and never changes a bit.
    split = call.chunks > 1 and call.seqs * heads < SPLIT_BELOW * sms
    chunks = call.chunks if split else 1
    parts = 2 if split and options["DV"] == 128 and call.seqs * heads * chunks <= HALVE_VALUES_UP_TO * sms else 1
    heads, options = heads * parts, {**options, "DV": options["DV"] // parts}
    tiles = call.seqs * heads
    items = tiles * chunks
    programs = _programs(items, sms)
    claim = items > programs
    # Of items that are taken, or of a row's chunks that are done; neither where each thread block has one whole row.
    counters = zeroed_ints(call.q.device, 1 if claim else tiles) if claim or split else call.kv_lens
    ring_bytes = SHARED_MEMORY_BYTES if split and not claim else _ring_bytes(call.page > 0, split, programs / sms)
    kept = _rows_kept(call, options["TOKENS"])
    rows = max(8, kept)
    box, descs = _boxes(call, HALF_KEYS, options["DV"])
    states = _partials(call, items, kept, split, options["DV"])
    attention_decode_kernel[(programs,)](
        call.q, *descs, out, lse, *states, counters, *_keys_of(call), call.seqs, heads, chunks, *places, call.scale * LOG2_E,
        call.window, SPLIT=split, CLAIM=claim,
        HALF=HALF_KEYS, BOX=box, STAGES=_ring_stages(rows, call.q.shape[-1], ring_bytes), ROWS=rows, ROWS_KEPT=kept,
        LANES=layout_of_scores(rows, DECODE_WARPS), WARPS=DECODE_WARPS, PARTS=parts, PASS=PASS_ROWS // rows,
        AT_ONCE=1 if claim else min(16, 1 << (chunks - 1).bit_length()), num_warps=DECODE_WARPS, **options,
    )  # fmt: skip
    if split and claim:
        _merge(call, out, lse, states, tiles, 1, chunks, options["TOKENS"], kept, want_lse=options["LSE"])


def _programs(items: int, sms: int) -> int:
    """Thread blocks for so many items: as few as need no more turns, which then read side by side to the end.

    With one for every multiprocessor 24 sequences of 8k took 6 % longer and 40 of 4k 5 %; 64 of 32k took 0.5 % less, eight of mixed
    lengths 4 % (H200).
    """
    return -(-items // -(-items // sms))


def _ring_bytes(paged: bool, split: bool, programs_share: float) -> float:
    """Keys and values that a thread block has on their way while all stream, where the blocks are that share of the multiprocessors.

    Memory is faster with fewer requests: 64 KiB of whole rows of packed keys each were 0.5 to 1 % faster than 96, and up to 2 % than 128.
    Who reads page numbers first, or pauses between chunks, takes 32 more (H200).
    """
    return (RING_BYTES + RING_MORE_BYTES * (paged + split)) / programs_share


def _ring_stages(rows: int, d: int, most_bytes: float) -> int:
    """Half blocks of keys or values: whole blocks until they are `most_bytes`, or what fits beside a decode's queries and a pass."""
    stage_bytes = HALF_KEYS * d * 2
    room = (SHARED_MEMORY_BYTES - BARRIER_BYTES - rows * d * 2 - PASS_BYTES) // stage_bytes
    return min(MOST_STAGES, room, 2 * max(2, math.ceil(most_bytes / (2 * stage_bytes))))


def _rows_kept(call: _Call, tokens: int) -> int:
    """Rows of a split tile that hold queries, rounded up to a power of two."""
    return 1 << (min(call.max_q_len, tokens) * call.group - 1).bit_length()


def _partials(call: _Call, slots: int, kept: int, split: bool, dv: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = slots if split else 1
    new = {"device": call.q.device, "dtype": torch.float32}
    return torch.empty(slots, kept, **new), torch.empty(slots, kept, **new), torch.empty(slots, kept, dv, **new)  # type: ignore[call-overload]  # a dict of keywords is beyond the stub


def _merge(
    call: _Call, out: torch.Tensor, lse: torch.Tensor, states: tuple[torch.Tensor, ...], items: int, tiles: int, chunks: int,
    tokens: int, kept: int, want_lse: bool,
) -> None:  # fmt: skip
    rows = min(call.max_q_len, tokens) * call.group
    dv = call.v.shape[-1]
    padded = 1 << (dv - 1).bit_length()
    unroll = min(32, max(8, 1 << (chunks - 1).bit_length()))  # chunks on their way at a time: maxnreg has the room
    attention_merge_kernel[(items, rows)](
        out, lse, *states, call.q_starts, call.kv_lens, call.kv_heads * call.head_tiles, tiles, chunks, out.stride(0), out.stride(1),
        lse.stride(0), call.window, CAUSAL=call.causal, GROUP=call.group, TOKENS=tokens, CHUNK=CHUNK_KEYS, BN=BLOCK_KEYS, DV=dv,
        DV_PAD=padded, ROWS_KEPT=kept, LSE=want_lse, UNROLL=unroll, ALL=chunks <= unroll, num_warps=max(1, min(4, padded // 64)),
        maxnreg=224, **overlap(out.device),
    )  # fmt: skip


def _launch_portable(call: _Call, out: torch.Tensor, lse: torch.Tensor, want_lse: bool) -> None:
    q = call.q
    d, tail = split_head(q.shape[-1])
    dv = call.v.shape[-1]
    group = call.group
    tokens = TILE_ROWS // group
    heads = call.kv_heads * call.head_tiles
    tiles = -(-call.max_q_len // tokens)
    items = call.seqs * heads * tiles
    split = call.chunks > 1 and tiles == 1 and items < 8 * multiprocessors(q.device)
    chunks = call.chunks if split else 1
    kept = _rows_kept(call, tokens) if split else TILE_ROWS
    parts = _partials(call, items * chunks, kept, split, dv)
    k_row, k_head = (call.k.stride(-3), call.k.stride(-2))
    v_row, v_head = (call.v.stride(-3), call.v.stride(-2))
    wide = max(d, dv) > 128
    attention_portable_kernel[(items * chunks,)](
        q, call.k, call.v, out, lse, *parts, call.q_starts, call.kv_starts, call.kv_lens,
        call.table if call.table is not None else call.kv_lens, call.table.stride(0) if call.table is not None else 0,
        heads, tiles, chunks, q.stride(0), q.stride(1), k_row, k_head, v_row, v_head, out.stride(0), out.stride(1),
        lse.stride(0), call.scale * LOG2_E, call.window, CAUSAL=call.causal, SPLIT=split, GROUP=group,
        HEAD_TILES=call.head_tiles, TOKENS=tokens, CHUNK=CHUNK_KEYS, BN=BLOCK_KEYS, PAGE=call.page, D=d,
        D_PAD=max(16, 1 << (d - 1).bit_length()), D_TAIL=tail, T_PAD=64, DV=dv, DV_PAD=max(16, 1 << (dv - 1).bit_length()),
        ROWS=TILE_ROWS, ROWS_KEPT=kept, LSE=want_lse, num_warps=8 if wide else 4, num_stages=1 if wide else 2,
    )  # fmt: skip
    if split:
        _merge(call, out, lse, parts, items, tiles, chunks, tokens, kept, want_lse)


class _Attention(torch.autograd.Function):
    """Packed attention with the deterministic backward kernels."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> torch.Tensor:
        out, lse = _forward(call, want_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        gradients = attention_gradients if runs_triton(q.device) else _reference_gradients
        dq, dk, dv = gradients(
            grads[0], q, k, v, out, lse, call.q_starts, call.kv_starts, call.kv_lens, call.max_q_len, call.max_kv_len,
            call.causal, call.window, call.scale,
        )  # fmt: skip
        return dq, dk, dv, None


def attention_reference(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sums in plain torch, on any device: output and log2 log-sum-exp. Slow; for tests and machines without a GPU."""
    q = call.q
    group = call.heads // call.kv_heads
    out = torch.zeros(*q.shape[:2], call.v.shape[-1], device=q.device, dtype=q.dtype)
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    starts = call.q_starts.tolist()
    for seq in range(call.seqs):
        kv_len = int(call.kv_lens[seq])
        keys, values = (_gather(call, x, seq, kv_len) for x in (call.k, call.v))
        rows = slice(starts[seq], starts[seq + 1])
        n = starts[seq + 1] - starts[seq]
        place = torch.arange(kv_len - n, kv_len, device=q.device)
        for head in range(call.heads):
            out[rows, head], lse[rows, head] = _reference_rows(
                q[rows, head], keys[:, head // group], values[:, head // group], place, call
            )
    return out, lse


def _gather(call: _Call, x: torch.Tensor, seq: int, kv_len: int) -> torch.Tensor:
    if call.table is None:
        first = int(call.kv_starts[seq])
        return x[first : first + kv_len]
    pages = call.table[seq, : -(-kv_len // call.page)].long()
    return x[pages].flatten(0, 1)[:kv_len]


def _reference_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: torch.Tensor, call: _Call
) -> tuple[torch.Tensor, torch.Tensor]:
    n, dv = q.shape[0], v.shape[-1]
    scale = torch.tensor(call.scale * LOG2_E, dtype=torch.float32)
    new = {"device": q.device, "dtype": torch.float32}
    empty = (torch.full((n,), EMPTY, **new), torch.zeros(n, **new), torch.zeros(n, dv, **new))  # type: ignore[call-overload]  # a dict of keywords is beyond the stub
    total = empty
    for chunk in range(0, k.shape[0], CHUNK_KEYS):
        m, l, acc = empty
        for first in range(chunk, min(chunk + CHUNK_KEYS, k.shape[0]), BLOCK_KEYS):
            key = torch.arange(first, min(first + BLOCK_KEYS, k.shape[0]), device=q.device)
            s = q.float() @ k[key].float().T
            seen = key[None, :] > (place - call.window)[:, None]
            if call.causal:
                seen &= key[None, :] <= place[:, None]
            s = s.masked_fill(~seen, float("-inf"))
            m_new = torch.maximum(m, torch.ceil(s.amax(1) * scale))
            p = torch.exp2((s.double() * scale.double() - m_new[:, None].double()).float())
            alpha = torch.exp2(m - m_new)
            l = l * alpha + p.sum(1)
            acc = acc * alpha[:, None] + p.to(v.dtype).float() @ v[key].float()
            m = m_new
        total = _reference_fold(total, (m, l, acc))
    m, l, acc = total
    inverse = torch.where(l > 0, 1.0 / l, 0.0)
    return (acc * inverse[:, None]).to(q.dtype), torch.where(l > 0, m + torch.log2(l.double()).float(), -math.inf)


def _reference_fold(
    total: tuple[torch.Tensor, ...], chunk: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (total_m, total_l, total_acc), (m, l, acc) = total, chunk
    m_new = torch.maximum(total_m, m)
    a, b = torch.exp2(total_m - m_new), torch.exp2(m - m_new)
    return m_new, total_l * a + l * b, total_acc * a[:, None] + acc * b[:, None]


def _reference_gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse_log2: torch.Tensor,
    q_starts: torch.Tensor, kv_starts: torch.Tensor, kv_lens: torch.Tensor, max_q_len: int, max_kv_len: int,
    causal: bool, window: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients by the same formulas, a sequence and a head at a time, heads of a group added in order."""
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
    starts = q_starts.tolist()
    for seq in range(kv_lens.numel()):
        n, kv_len, first = starts[seq + 1] - starts[seq], int(kv_lens[seq]), int(kv_starts[seq])
        rows, keys = slice(starts[seq], starts[seq + 1]), slice(first, first + kv_len)
        place = torch.arange(kv_len - n, kv_len, device=q.device)[:, None]
        key = torch.arange(kv_len, device=q.device)[None, :]
        seen = (key > place - window) & ((key <= place) if causal else torch.ones_like(key <= place))
        for head in range(q.shape[1]):
            kv = head // group
            q_h, k_h, v_h, g_h = q[rows, head].float(), k[keys, kv].float(), v[keys, kv].float(), grad[rows, head].float()
            p = torch.exp2(q_h @ k_h.T * (scale * LOG2_E) - lse_log2[rows, head, None]).masked_fill(~seen, 0.0)
            delta = (g_h * out[rows, head].float()).sum(1, keepdim=True)
            ds = (p * (g_h @ v_h.T - delta)).to(q.dtype).float() * scale
            dq[rows, head] = ds @ k_h
            dk[keys, kv] += ds.T @ q_h
            dv[keys, kv] += p.to(q.dtype).float().T @ g_h
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
