"""The layouts an engine can run: every combination that divides, and for any other the reason it is refused.

`train_obstacles` and `rollout_obstacles` are the one place of these rules: the search filters with them, a spec that fixes a
layout is checked with them, and `explain --why-not` quotes them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.mixers import GroupedQuery
from miles_plan.ir.layout import RolloutLayout, TrainLayout

MAX_VPP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a layout has to fit: GPUs, GPUs of one node and of one NVLink domain, sequences of a step, and the engine.

    expected_tokens is the length of the longest sequence, which context parallelism cuts.
    """

    num_gpus: int
    gpus_per_node: int
    nvlink_domain: int
    sequences: int
    longest_sequence_tokens: int
    engine: str


def train_obstacles(layout: TrainLayout, model: ModelArchitecture, room: Room) -> Iterator[str]:
    """Why `layout` cannot run; nothing if it can."""
    yield from layout.problems()
    if layout.world_size != room.num_gpus:
        yield f"tp x cp x dp x pp = {layout.world_size} GPUs, {room.num_gpus} are given"
    yield from _tensor_obstacles(layout.tp, model)
    if layout.tp > room.nvlink_domain:
        yield f"tp={layout.tp} crosses the NVLink domain of {room.nvlink_domain} GPUs"
    chunks = layout.pp * layout.vpp
    if chunks > model.num_layers:
        yield f"pp x vpp = {chunks} chunks, the model has {model.num_layers} layers"
    if layout.stage_layers and sum(layout.stage_layers) != model.num_layers:
        yield f"stage_layers add up to {sum(layout.stage_layers)}, the model has {model.num_layers} layers"
    if layout.vpp > 1 and not layout.stage_layers and model.num_layers % chunks:
        yield f"{model.num_layers} layers do not split into pp x vpp = {chunks} equal chunks"
    yield from _expert_obstacles(layout, model, room)
    if layout.dp > room.sequences:
        yield f"dp={layout.dp} replicas for {room.sequences} sequences a step"
    yield from _engine_obstacles(layout, model, room)


def _tensor_obstacles(tp: int, model: ModelArchitecture) -> Iterator[str]:
    if model.attention_heads and model.attention_heads % tp:
        yield f"tp={tp} does not divide {model.attention_heads} attention heads"
    for kind in model.kinds:
        if isinstance(kind.mixer, GroupedQuery) and kind.mixer.kv_heads % tp and tp % kind.mixer.kv_heads:
            yield f"tp={tp} neither divides {kind.mixer.kv_heads} key-value heads nor is a multiple of them"
            return


def _expert_obstacles(layout: TrainLayout, model: ModelArchitecture, room: Room) -> Iterator[str]:
    moe = model.moe
    if moe is None:
        if layout.ep > 1 or layout.etp > 1:
            yield f"{model.name} has no experts, ep and etp must be 1"
        return
    if moe.experts % layout.ep:
        yield f"ep={layout.ep} does not divide {moe.experts} experts"
    if moe.size % layout.etp:
        yield f"etp={layout.etp} does not divide the experts' width {moe.size}"


def _engine_obstacles(layout: TrainLayout, model: ModelArchitecture, room: Room) -> Iterator[str]:
    if room.engine == "fsdp2":
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp"):
            if (size := getattr(layout, name)) > 1:
                yield f"fsdp2 shards over data parallel ranks only, {name}={size}"
    if room.engine == "torch":
        if layout.cp > 1 or layout.vpp > 1:
            yield f"the torch engine has neither context parallelism nor interleaving, cp={layout.cp} vpp={layout.vpp}"
        if model.moe is not None and layout.etp != layout.tp:
            yield f"the torch engine cuts experts as it cuts the rest: etp={layout.etp} must be tp={layout.tp}"
        if layout.dp % layout.ep:
            yield f"the torch engine spreads experts over data parallel ranks: ep={layout.ep} must divide dp={layout.dp}"
        if layout.sequence_parallel:
            yield "the torch engine has no sequence parallelism"


def train_layouts(model: ModelArchitecture, room: Room) -> list[TrainLayout]:
    """Every layout without obstacles, in a fixed order. Sizes are powers of two where they cut heads or sequences."""
    powers = [1 << exponent for exponent in range(room.num_gpus.bit_length()) if room.num_gpus % (1 << exponent) == 0]
    tensor = [tp for tp in powers if tp <= room.nvlink_domain and not any(_tensor_obstacles(tp, model))]
    pipeline = [pp for pp in _divisors(room.num_gpus) if pp <= model.num_layers]
    context = [cp for cp in powers if cp == 1 or cp * 1024 <= room.longest_sequence_tokens]
    found = []
    for tp, pp, cp in itertools.product(tensor, pipeline, context):
        if room.num_gpus % (tp * pp * cp):
            continue
        dp = room.num_gpus // (tp * pp * cp)
        if dp > room.sequences:
            continue
        for ep, etp in _expert_sizes(model, ranks=tp * cp * dp, tp=tp):
            for vpp in _interleavings(model, pp):
                layout = TrainLayout(
                    dp=dp,
                    tp=tp,
                    pp=pp,
                    vpp=vpp,
                    cp=cp,
                    ep=ep,
                    etp=etp,
                    sequence_parallel=tp > 1 and room.engine == "megatron",
                    stage_layers=even_stages(model.num_layers, pp) if vpp == 1 else (),
                )
                # Megatron-core runs whatever divides, as these sizes do by how they are made; others have rules of their own.
                if room.engine == "megatron" or not any(train_obstacles(layout, model, room)):
                    found.append(layout)
    return found


Sizes = Mapping[str, int]  # some sizes of a layout by name, the others left open
ANY_SIZES: Sizes = MappingProxyType({})


def has_sizes(layout: TrainLayout | RolloutLayout, sizes: Sizes) -> bool:
    """Whether the layout has these sizes."""
    return all(getattr(layout, name) == size for name, size in sizes.items())


def train_layouts_with(model: ModelArchitecture, room: Room, sizes: Sizes) -> tuple[list[TrainLayout], Counter[str]]:
    """Layouts that have `sizes`, also such as the search would not think of; and the obstacles of those that cannot run.

    The search's own layouts are bent to the sizes, data parallelism taking up what is left. The counter names the obstacles
    of the layouts with the fewest of them.
    """
    changes: dict[str, Any] = dict(sizes)
    found: dict[TrainLayout, None] = {}
    obstacles: dict[int, Counter[str]] = {}
    for template in train_layouts(model, room):
        bent = replace(template, **changes)
        if "etp" not in sizes:
            bent = replace(bent, etp=bent.tp if template.etp > 1 else 1)
        if "dp" not in sizes:
            bent = replace(bent, dp=max(1, room.num_gpus // max(1, bent.tp * bent.pp * bent.cp)))
        uneven = even_stages(model.num_layers, bent.pp) if bent.vpp == 1 and 0 < bent.pp <= model.num_layers else ()
        bent = replace(bent, sequence_parallel=bent.tp > 1 and room.engine == "megatron", stage_layers=uneven)
        if bent in found:
            continue
        against = list(train_obstacles(bent, model, room))
        if against:
            obstacles.setdefault(len(against), Counter()).update(against)
        else:
            found[bent] = None
    return list(found), obstacles[min(obstacles)] if obstacles else Counter()


def rollout_layouts_with(model: ModelArchitecture, room: Room, sizes: Sizes) -> tuple[list[RolloutLayout], Counter[str]]:
    """The same for engines; as many of them as the GPUs hold, unless `sizes` says how many."""
    found: dict[RolloutLayout, None] = {}
    obstacles: dict[int, Counter[str]] = {}
    for template in rollout_layouts(model, room):
        bent = replace(template, **dict(sizes))
        if "engines" not in sizes:
            bent = replace(bent, engines=max(1, room.num_gpus // max(1, bent.gpus_per_engine)))
        if bent in found:
            continue
        against = list(rollout_obstacles(bent, model, room))
        if against:
            obstacles.setdefault(len(against), Counter()).update(against)
        else:
            found[bent] = None
    return list(found), obstacles[min(obstacles)] if obstacles else Counter()


def even_stages(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage where they do not divide: the remainder goes to the middle, away from embedding and head.

    Empty where they do divide, which is how a layout says "even".
    """
    if num_layers % pp == 0:
        return ()
    base, extra = divmod(num_layers, pp)
    first = (pp - extra) // 2
    return tuple(base + (first <= stage < first + extra) for stage in range(pp))


def _expert_sizes(model: ModelArchitecture, *, ranks: int, tp: int) -> list[tuple[int, int]]:
    moe = model.moe
    if moe is None:
        return [(1, 1)]
    tensor = [etp for etp in sorted({1, tp}) if moe.size % etp == 0]
    return [(ep, etp) for etp in tensor for ep in _divisors(moe.experts) if ranks % (ep * etp) == 0]


def _interleavings(model: ModelArchitecture, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    return [vpp for vpp in range(1, MAX_VPP + 1) if vpp == 1 or model.num_layers % (pp * vpp) == 0]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def rollout_obstacles(layout: RolloutLayout, model: ModelArchitecture, room: Room) -> Iterator[str]:
    """Why the engines cannot run so; nothing if they can."""
    yield from layout.problems()
    if layout.world_size > room.num_gpus:
        yield f"engines x tp x pp = {layout.world_size} GPUs, {room.num_gpus} are given"
    attention_tp = layout.tp // layout.dp_attention if layout.dp_attention else layout.tp
    yield from _tensor_obstacles(max(attention_tp, 1), model)
    if layout.pp > model.num_layers:
        yield f"pp={layout.pp}, the model has {model.num_layers} layers"
    moe = model.moe
    if moe is None and layout.ep > 1:
        yield f"{model.name} has no experts, ep must be 1"
    if moe is not None and moe.experts % layout.ep:
        yield f"ep={layout.ep} does not divide {moe.experts} experts"
    if room.engine == "torch":
        for name in ("pp", "dp_attention", "ep"):
            if (size := getattr(layout, name)) > 1:
                yield f"the torch engine is tensor parallel only, {name}={size}"


def rollout_layouts(model: ModelArchitecture, room: Room) -> list[RolloutLayout]:
    """Every engine shape without obstacles that uses all of `room.num_gpus`, smallest engines first.

    Engines span whole nodes when they are larger than one. Expert parallelism spans the engine or is off, and attention is
    data parallel over all of it or not at all: SGLang's two usual forms.
    """
    found = []
    for size in _divisors(room.num_gpus):
        if size > room.gpus_per_node and size % room.gpus_per_node:
            continue
        experts = sorted({1, size}) if model.moe is not None else [1]
        for ep, dp_attention in itertools.product(experts, sorted({1, size})):
            if dp_attention > 1 and ep == 1:
                continue
            layout = RolloutLayout(engines=room.num_gpus // size, tp=size, ep=ep, dp_attention=dp_attention)
            if not any(rollout_obstacles(layout, model, room)):
                found.append(layout)
    return found
