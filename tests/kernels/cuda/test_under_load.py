"""A decoder of Qwen3-0.6B's shape, step by step as the two engines issue it, while another process keeps the GPU busy.

Every intermediate of every layer is compared on the device with one packed prefill of all sequences: the trainer's passes,
SGLang's prefill into pages, decode steps launched one by one, and decode steps replayed from CUDA graphs whose capture forks to
a second stream. A `lean` pass drops its intermediates as engines do, so that their memory is used again. Sequences are short
(8 to 22 tokens), weights may be heavy-tailed. Nothing waits for the host inside a pass, so launches overlap as in the engines.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.draw import differing
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.gemm import gemm
from miles_plan.kernels.cuda.hooks_sglang import _Rotary
from miles_plan.kernels.cuda.log_prob import log_prob
from miles_plan.kernels.cuda.matmul import matmul
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rope import rope
from miles_plan.kernels.cuda.rope_table import rotation_tables
from miles_plan.kernels.cuda.swiglu import swiglu
from miles_plan.kernels.cuda.tuning import DIRECT, RING, GemmTile

pytestmark = pytest.mark.gpu

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY, PAGE = 1024, 16, 8, 128, 3072, 151_936, 64
GROUP = HEADS // KV_HEADS
CONTEXT = 40_960  # what a captured decode step allows for, as SGLang's backend does: it splits keys into chunks
SMALLEST, LARGEST = 8, 22  # tokens of a sequence
THETA = 1_000_000

BUSY = """
import random, sys, time, torch
a, b = (torch.randn(6144, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(2))
c, d = (torch.empty(1 << 28, device="cuda", dtype=torch.uint8) for _ in range(2))
side = torch.cuda.Stream()
print("busy", flush=True)
end = time.time() + float(sys.argv[1])
while time.time() < end:
    for _ in range(random.randint(1, 12)):
        a @ b if random.random() < 0.6 else c.copy_(d)
        with torch.cuda.stream(side):
            if random.random() < 0.5:
                torch.relu(a)
    if random.random() < 0.7:
        torch.cuda.synchronize()
        time.sleep(random.random() ** 3 * 0.01)
"""


@contextmanager
def busy_gpu(seconds: float) -> Iterator[None]:
    """Another process on the same GPU, with bursts of products and copies, for at most `seconds`."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "busy"
        yield
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; `by_group` is `qkv` with rows in Megatron's order: queries, key and value of each group."""

    norm: torch.Tensor
    qkv: torch.Tensor
    by_group: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def heavy(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Columns scaled log-normally, some a thousandfold (at unchanged overall size), some zero, some elements subnormal."""
    scale = torch.exp(1.5 * torch.randn(tensor.shape[-1], device=tensor.device, generator=generator))
    some = torch.rand(tensor.shape[-1], device=tensor.device, generator=generator)
    scale = torch.where(some < 0.004, scale * 1e3, scale)
    scale = torch.where(some > 0.97, torch.zeros_like(scale), scale)
    odd = torch.rand(tensor.shape, device=tensor.device, generator=generator)
    scaled = tensor * scale / scale.square().mean().sqrt()
    return torch.where(odd < 0.002, torch.full_like(scaled, 1e-39), scaled)


def make_layers(count: int, device: torch.device, seed: int, tails: bool) -> list[Layer]:
    """Random weights; with `tails`, of columns of widely different size."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def weight(n: int, k: int) -> torch.Tensor:
        values = torch.randn(n, k, device=device, generator=generator) * k**-0.5
        return (heavy(values, generator) if tails else values).to(torch.bfloat16)

    def gain(n: int) -> torch.Tensor:
        spread = 0.8 if tails else 0.1
        return torch.exp(spread * torch.randn(n, device=device, generator=generator)).to(torch.bfloat16)

    layers = []
    for _ in range(count):
        qkv = weight((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
        q, k, v = qkv.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])
        groups = (q.view(KV_HEADS, GROUP * HEAD, HIDDEN), k.view(KV_HEADS, HEAD, HIDDEN), v.view(KV_HEADS, HEAD, HIDDEN))
        layers.append(
            Layer(
                gain(HIDDEN), qkv, torch.cat(groups, 1).reshape_as(qkv).contiguous(), gain(HEAD), gain(HEAD),
                weight(HIDDEN, HEADS * HEAD), gain(HIDDEN), weight(2 * FFN, HIDDEN), weight(HIDDEN, FFN),
            )
        )  # fmt: skip
    return layers


@dataclass
class Model:
    """Weights, the sequences, and every intermediate of their packed prefill: [layer][name] -> [tokens, ...]."""

    layers: list[Layer]
    table: torch.Tensor
    final: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    rotary: Any
    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    starts: list[int]
    want: list[dict[str, torch.Tensor]] = field(default_factory=list)
    pools: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Seen = list[dict[str, torch.Tensor]]


def trainer_layer(
    layer: Layer, x: torch.Tensor, model: Model, positions: torch.Tensor, attend: Attend, at: int
) -> dict[str, torch.Tensor]:
    """A layer as Megatron-core issues it: grouped qkv, queries and keys turned in two calls, torch's own residual adds."""
    seen = {"norm": rms_norm(x, layer.norm)}
    mixed = matmul(seen["norm"], layer.by_group).view(-1, KV_HEADS, (GROUP + 2) * HEAD)
    q, k, v = mixed.split([GROUP * HEAD, HEAD, HEAD], -1)
    q, k = rms_norm(q.reshape(-1, HEADS, HEAD), layer.q_norm), rms_norm(k, layer.k_norm)
    seen["q"] = rope(q, q[:, :0], model.cos, model.sin, positions)[0]
    seen["k"] = rope(k, k[:, :0], model.cos, model.sin, positions)[0]
    seen["v"] = v.contiguous()
    seen["attention"] = attend(at, seen["q"], seen["k"], seen["v"]).flatten(1)
    seen["o"] = matmul(seen["attention"], layer.o, order="tree")
    seen["middle"] = x + seen["o"]
    seen["post norm"] = rms_norm(seen["middle"], layer.post_norm)
    seen["gate up"] = matmul(seen["post norm"], layer.gate_up)
    seen["swiglu"] = swiglu(seen["gate up"])
    seen["down"] = matmul(seen["swiglu"], layer.down, order="tree")
    seen["out"] = seen["middle"] + seen["down"]
    return seen


def rollout_layer(
    layer: Layer, x: torch.Tensor, residual: torch.Tensor | None, model: Model, positions: torch.Tensor, attend: Attend,
    at: int, side: torch.cuda.Stream | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A layer as SGLang issues it: fused residual adds, keys' norm on a second stream while a graph is captured."""
    seen: dict[str, torch.Tensor] = {}
    if residual is None:
        residual, seen["norm"] = x, rms_norm(x, layer.norm)
    else:
        seen["norm"], residual = rms_norm(x, layer.norm, residual=residual)
        seen["before"] = residual
    q, k, v = matmul(seen["norm"], layer.qkv).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    if side is not None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        q = rms_norm(q.reshape(-1, HEAD), layer.q_norm)
        with torch.cuda.stream(side):
            k = rms_norm(k.reshape(-1, HEAD), layer.k_norm)
        main.wait_stream(side)
    else:
        q, k = rms_norm(q.reshape(-1, HEAD), layer.q_norm), rms_norm(k.reshape(-1, HEAD), layer.k_norm)
    rows = x.shape[0]
    q, k = model.rotary(positions, q.view(rows, HEADS * HEAD), k.view(rows, KV_HEADS * HEAD))
    seen["q"], seen["k"] = q.view(rows, HEADS, HEAD), k.view(rows, KV_HEADS, HEAD)
    seen["v"] = v.view(rows, KV_HEADS, HEAD)
    seen["attention"] = attend(at, seen["q"], seen["k"], seen["v"]).flatten(1)
    seen["o"] = matmul(seen["attention"], layer.o, order="tree")
    seen["post norm"], seen["middle"] = rms_norm(seen["o"], layer.post_norm, residual=residual)
    seen["gate up"] = matmul(seen["post norm"], layer.gate_up)
    seen["swiglu"] = swiglu(seen["gate up"])
    seen["down"] = matmul(seen["swiglu"], layer.down, order="tree")
    return seen


def head(model: Model, hidden: torch.Tensor, targets: torch.Tensor, rows_at_once: int) -> dict[str, torch.Tensor]:
    """Log-probabilities of the targets, in blocks of rows."""
    parts = [
        log_prob(matmul(hidden[i : i + rows_at_once], model.table), targets[i : i + rows_at_once])
        for i in range(0, hidden.shape[0], rows_at_once)
    ]
    return {"final norm": hidden, "log prob": torch.cat(parts)}


def trainer_pass(model: Model, first: int, last: int, lean: bool = False) -> Seen:
    """Sequences [first, last) packed."""
    rows = slice(model.starts[first], model.starts[last])
    starts = torch.tensor(model.starts[first : last + 1], device=model.ids.device, dtype=torch.int32) - rows.start
    positions = model.positions[rows]

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, q_starts=starts, max_q_len=LARGEST)

    x = embedding(model.ids[rows], model.table)
    seen: Seen = []
    for at, layer in enumerate(model.layers):
        found = trainer_layer(layer, x, model, positions, attend, at)
        x = found["out"]
        seen.append({} if lean else found)
    seen.append(head(model, rms_norm(x, model.final), model.targets[rows], 1024))
    return seen


def rollout_pass(
    model: Model, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, attend: Attend,
    side: torch.cuda.Stream | None = None, lean: bool = False,
) -> Seen:  # fmt: skip
    """Any tokens with their keys and values in pages."""
    x, residual = torch.nn.functional.embedding(ids, model.table), None
    seen: Seen = []
    for at, layer in enumerate(model.layers):
        found = rollout_layer(layer, x, residual, model, positions, attend, at, side)
        x, residual = found["down"], found["middle"]
        seen.append({} if lean else found)
    seen.append(head(model, rms_norm(x, model.final, residual=residual)[0], targets, 1 << 20))
    return seen


def paged(
    model: Model, where: torch.Tensor, q_starts: torch.Tensor, lens: torch.Tensor, pages: torch.Tensor, most: int, longest: int
) -> Attend:
    """Attention over the pools, this pass's keys and values written at `where` first."""

    def attend(at: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = model.pools[at]
        keys[where] = k
        values[where] = v
        paged_keys, paged_values = (pool.view(-1, PAGE, KV_HEADS, HEAD) for pool in (keys, values))
        return attention(
            q, paged_keys, paged_values, q_starts=q_starts, kv_lens=lens, page_table=pages, max_q_len=most, max_kv_len=longest
        )

    return attend


def from_pools(model: Model, seen: Seen, where: torch.Tensor) -> Seen:
    """A lean pass with the keys and values that it left in the pools."""
    pools = [{"k": keys[where], "v": values[where]} for keys, values in model.pools]
    return [{**pool, **found} for pool, found in zip(pools, seen, strict=False)] + seen[len(pools) :]


def prefill_pass(model: Model, first: int, last: int, lean: bool = False) -> Seen:
    """Sequences [first, last) into their pages, all tokens of each."""
    rows = slice(model.starts[first], model.starts[last])
    device = model.ids.device
    starts = torch.tensor(model.starts[first : last + 1], device=device, dtype=torch.int32)
    lens = starts[1:] - starts[:-1]
    owner = torch.repeat_interleave(torch.arange(first, last, device=device), lens.long(), output_size=rows.stop - rows.start)
    where = (owner + 1) * PAGE + model.positions[rows]
    pages = torch.arange(first + 1, last + 1, device=device, dtype=torch.int32)[:, None].contiguous()
    attend = paged(model, where, starts - rows.start, lens, pages, LARGEST, LARGEST)
    seen = rollout_pass(model, model.ids[rows], model.positions[rows], model.targets[rows], attend, lean=lean)
    return from_pools(model, seen, where) if lean else seen


class DecodeStep:
    """A decode step of `size` tokens at any places; captured with `graph`, rows past the tokens given are padding."""

    def __init__(self, model: Model, size: int, graph: bool, lean: bool) -> None:
        device = model.ids.device
        self.model, self.size, self.lean = model, size, lean
        self.ids = torch.zeros(size, device=device, dtype=torch.int64)
        self.targets, self.positions, self.where = (torch.zeros_like(self.ids) for _ in range(3))
        self.lens = torch.ones(size, device=device, dtype=torch.int32)
        self.pages = torch.zeros(size, CONTEXT // PAGE if graph else 1, device=device, dtype=torch.int32)
        starts = torch.arange(size + 1, device=device, dtype=torch.int32)
        longest = CONTEXT if graph else LARGEST
        self.attend = paged(model, self.where, starts, self.lens, self.pages, 1, longest)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.seen: Seen = []
        if graph:
            side = torch.cuda.Stream()
            self._run(None)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.seen = self._run(side)

    def _run(self, side: torch.cuda.Stream | None) -> Seen:
        return rollout_pass(self.model, self.ids, self.positions, self.targets, self.attend, side, self.lean)

    def __call__(self, tokens: torch.Tensor, owners: torch.Tensor) -> Seen:
        """tokens: rows of the packed prefill, of as many different sequences `owners`."""
        model, count = self.model, tokens.numel()
        position = model.positions[tokens]
        self.ids[:count] = model.ids[tokens]
        self.targets[:count] = model.targets[tokens]
        self.positions[:count] = position
        self.lens[:count] = (position + 1).to(torch.int32)
        self.pages[:count, 0] = (owners + 1).to(torch.int32)
        self.where[:count] = (owners + 1) * PAGE + position
        for padding, value in ((self.ids, 0), (self.positions, 0), (self.where, 0), (self.lens, 1)):
            padding[count:] = value
        seen = self.seen
        if self.graph is not None:
            self.graph.replay()
        else:
            seen = self._run(None)
        return from_pools(model, seen, self.where[:count]) if self.lean else seen


def trainer_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the Megatron engine turns queries by: frequencies of the model's config, computed on the host."""
    frequencies = 1.0 / (THETA ** (torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD))
    places = torch.arange(LARGEST, device=device, dtype=torch.float32)
    return rotation_tables(torch.outer(places, torch.tensor(frequencies.tolist(), device=device)))


def rollout_rotary(device: torch.device) -> Any:
    """What takes the place of SGLang's rotary embedding."""
    theirs = SimpleNamespace(
        is_neox_style=True, head_size=HEAD, rotary_dim=HEAD, base=THETA, cos_sin_cache=torch.empty(4096, HEAD, device=device)
    )
    return _Rotary("rotary_emb", theirs, {}, plain=True)


def make_model(layers: int, sequences: int, device: torch.device, seed: int = 0, tails: bool = False) -> Model:
    """The model, and its intermediates by one packed prefill."""
    dice = random.Random(seed)
    lengths = [dice.randint(SMALLEST, LARGEST) for _ in range(sequences)]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    table = torch.randn(VOCABULARY, HIDDEN, device=device, generator=generator) * 0.05
    table = (heavy(table, generator) if tails else table).to(torch.bfloat16)
    ids, targets = (torch.randint(0, 300, (starts[-1],), device=device, generator=generator) for _ in range(2))
    cos, sin = trainer_tables(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    gain = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    rotary = rollout_rotary(device)
    model = Model(make_layers(layers, device, seed, tails), table, gain, cos, sin, rotary, ids, targets, positions, starts)
    for _ in range(layers):
        unwritten = [torch.full(((sequences + 1) * PAGE, KV_HEADS, HEAD), float("nan"), device=device) for _ in range(2)]
        model.pools.append((unwritten[0].to(torch.bfloat16), unwritten[1].to(torch.bfloat16)))
    model.want = trainer_pass(model, 0, sequences)
    owner = torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths)).to(device)
    where = (owner + 1) * PAGE + positions
    for at, (keys, values) in enumerate(model.pools):
        keys[where], values[where] = model.want[at]["k"], model.want[at]["v"]
        model.want[at]["before"] = model.want[at - 1]["out"] if at else embedding(ids, table)
    return model


class Tally:
    """Differing elements by (way, op), counted on the device; the first layer that differed of each way."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
        self.elements: dict[tuple[str, str], int] = defaultdict(int)
        self.differing: dict[tuple[str, str], int] = defaultdict(int)
        self.passes: dict[str, int] = defaultdict(int)
        self.bad_passes: dict[str, int] = defaultdict(int)
        self.notes: list[str] = []
        self._pending: list[tuple[str, str, list[tuple[int, str]], torch.Tensor]] = []

    def add(self, way: str, label: str, model: Model, seen: Seen, rows: slice | torch.Tensor, count: int) -> None:
        """Compare one pass with the packed prefill's `rows`; only its first `count` rows are looked at."""
        keys, sums = [], []
        for at, (found, want) in enumerate(zip(seen, model.want, strict=True)):
            for name, tensor in found.items():
                if name in want:
                    keys.append((at, name))
                    sums.append(differing(tensor[:count].reshape(count, -1), want[name][rows].reshape(count, -1)))
                    self.elements[way, name] += tensor[:count].numel()
        self._pending.append((way, label, keys, torch.stack(sums)))
        self.passes[way] += 1

    def settle(self) -> None:
        """Read the counts; notes the first op and layer of each pass that differed."""
        for way, label, keys, sums in self._pending:
            values = sums.tolist()
            for (_, name), value in zip(keys, values, strict=True):
                self.differing[way, name] += value
            wrong = [(at, name, value) for (at, name), value in zip(keys, values, strict=True) if value]
            if wrong:
                self.bad_passes[way] += 1
                where = ", ".join(f"layer {at} {name}: {value}" for at, name, value in wrong[:4])
                self.notes.append(f"{way} {label}: {where} ({len(wrong)} tensors)")
                if len(self.notes) <= 40:
                    print(f"DIFFERS {self.notes[-1]}", flush=True)
        self._pending.clear()


@dataclass
class Bench:
    """What one run has: the model, the captured steps, the dice."""

    model: Model
    tally: Tally
    dice: random.Random
    steps: dict[tuple[int, bool, bool], DecodeStep] = field(default_factory=dict)

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` tokens of as many sequences, anywhere in each."""
        owners = self.dice.sample(range(self.model.sequences), count)
        rows = [self.dice.randrange(self.model.starts[each], self.model.starts[each + 1]) for each in owners]
        device = self.model.ids.device
        both = torch.tensor([rows, owners]).pin_memory().to(device, non_blocking=True)
        return both[0], both[1]

    def decode(self, size: int, graph: bool, lean: bool) -> None:
        """One decode step of up to `size` tokens."""
        key = (size, graph, lean)
        if key not in self.steps:
            self.steps[key] = DecodeStep(self.model, size, graph, lean)
        count = self.dice.randint(max(1, size - 7), size) if graph else size
        tokens, owners = self.tokens(count)
        seen = self.steps[key](tokens, owners)
        way = ("decode graph" if graph else "decode") + " lean" * lean
        self.tally.add(way, f"{count} of {size}", self.model, seen, tokens, count)

    def span(self, tokens: int) -> tuple[int, int]:
        """Sequences with about that many tokens."""
        count = max(1, min(self.model.sequences, tokens // 15))
        first = self.dice.randrange(self.model.sequences - count + 1)
        return first, first + count

    def packed(self, tokens: int, trainer: bool, lean: bool) -> None:
        """A micro-batch, or a prefill."""
        first, last = self.span(tokens)
        seen = trainer_pass(self.model, first, last, lean) if trainer else prefill_pass(self.model, first, last, lean)
        rows = slice(self.model.starts[first], self.model.starts[last])
        way = ("micro-batch" if trainer else "prefill") + " lean" * lean
        self.tally.add(way, f"sequences {first}:{last}", self.model, seen, rows, rows.stop - rows.start)

    def once(self, kind: str, sizes: list[int]) -> None:
        """One pass of a kind."""
        size, lean = self.dice.choice(sizes), kind.endswith(" lean")
        kind = kind.removesuffix(" lean")
        if kind in ("decode", "decode graph"):
            self.decode(size, kind == "decode graph", lean)
        else:
            self.packed(size, kind == "micro-batch", lean)


SIZES = {
    "decode graph": [1, 2, 4, 8, 16, 64, 200, 256],
    "decode": [1, 7, 64, 200, 256, 512],
    "prefill": [64, 512, 1500, 4000, 8000],
    "micro-batch": [16, 200, 512, 1500, 4000],
}


def hammer(bench: Bench, seconds: float, kinds: list[str], most: int = 1 << 30) -> None:
    """Passes of the kinds in turn until the time is over, a noisy stream of this process beside them half of the time."""
    noise, square = torch.cuda.Stream(), torch.randn(4096, 4096, device=bench.model.ids.device, dtype=torch.bfloat16)
    end, turn = time.time() + seconds, 0
    while time.time() < end and turn < most:
        if bench.dice.random() < 0.4:
            with torch.cuda.stream(noise):
                for _ in range(bench.dice.randint(1, 4)):
                    torch.mm(square, square)
        kind = kinds[turn % len(kinds)]
        for _ in range(6 if kind.startswith("decode graph") else 2):
            bench.once(kind, SIZES[kind.removesuffix(" lean")])
        turn += 1
        if turn % 4 == 0:
            bench.tally.settle()
    bench.tally.settle()


def test_a_wide_tile_of_the_direct_kernel_waits_for_both_warp_groups(gpu: torch.device) -> None:
    """The last stage of the ring lies where the finished tile is laid out anew: no warp may write there while another reads."""
    for k in (2048, 3584, 5120):
        x, weight = (torch.randn(n, k, device=gpu).to(torch.bfloat16) for n in (512, 4096))
        want = torch.empty(512, 4096, device=gpu, dtype=torch.bfloat16)
        gemm(x, weight, want, tile=GemmTile(RING, False, 64, 2, 128, 0, 64, 4, 8, 0))
        wrong = torch.zeros((), device=gpu, dtype=torch.int64)
        for stages in (3, 4, 5, 6):
            tile = GemmTile(DIRECT, False, 64, 2, 128, 0, 64, stages, 8, 2)
            for _ in range(200):
                out = torch.empty_like(want)
                gemm(x, weight, out, tile=tile)
                wrong += differing(out, want)
        assert int(wrong) == 0, f"K={k}"


@pytest.mark.parametrize("tails", [False, True])
def test_every_intermediate_keeps_its_bits_while_the_gpu_is_busy(gpu: torch.device, tails: bool) -> None:
    with torch.no_grad(), busy_gpu(120):
        sizes = {kind: values[:3] for kind, values in SIZES.items()}
        model = make_model(3, max(SIZES["decode"]), gpu, tails=tails)  # a step decodes one token of each of as many sequences
        bench = Bench(model, Tally(), random.Random(0))
        for kind, values in sizes.items():
            for size in values:
                for _ in range(3):
                    bench.once(kind, [size])
        hammer(bench, 4.0, [*sizes, *(f"{kind} lean" for kind in sizes)])
    assert bench.tally.notes == []
    assert bench.tally.passes["decode graph"] > 10
