"""Every way to generate on a number of GPUs that fits their memory, priced: the rollout's half of the joint search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Cluster, Gpu
from miles_plan.catalog.mixers import GroupedQuery
from miles_plan.cost.decode_time import DecodeModel, Speculation
from miles_plan.cost.draft import draft_of
from miles_plan.cost.profile import profile_for
from miles_plan.cost.rollout_memory import RolloutMemory, RolloutMemoryOptions, rollout_memory
from miles_plan.cost.rollout_time import RolloutTime, RolloutWorkload, simulate_rollout
from miles_plan.ir.layout import RolloutLayout
from miles_plan.passes.base import PassContext
from miles_plan.passes.layout_space import (
    ANY_SIZES,
    Room,
    Sizes,
    rollout_layouts,
    rollout_layouts_with,
    rollout_obstacles,
)
from miles_plan.passes.number_formats import KV_BYTES, ROLLOUT_PRECISION
from miles_plan.passes.train_choices import MARGIN_FRACTION
from miles_plan.passes.train_draft import ACCEPTANCE_FROZEN, ACCEPTANCE_TRAINED, accept_length, draft_tokens
from miles_plan.passes.workload import StepWorkload
from miles_plan.spec.rollout import RolloutLayoutSpec

MAX_RUNNING = 512  # requests of one engine; beyond it SGLang's scheduler and CUDA graphs stop paying
GRAPH_BATCH = MAX_RUNNING  # a batch beyond its CUDA graphs waits for the host at every kernel
PREFILL_TOKENS = 8192  # SGLang's chunked_prefill_size on an 80 GB GPU and up
EMBEDDED_POOL_TOKENS = 65_536  # an embedded engine's cache is sized by what the batch needs, at most this
# Python's share of one decode step of the embedded engine: scheduling, sampling, routing records, for about a hundred requests
# (the quickstart, planned against measured). SGLang overlaps its own with the GPU.
EMBEDDED_STEP_S = 0.01
FLOOR_SHARE = 0.95  # of a bound's tokens: the simulation's clock rounds lengths to a thirty-second of the longest or less
MIN_STATIC_FRACTION, MAX_STATIC_FRACTION = 0.1, 0.92


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutChoice:
    """One priced way to generate one step's samples. Bytes are of one GPU; pool_tokens and max_running of one engine."""

    layout: RolloutLayout
    rollout_s: float
    low_s: float
    high_s: float
    memory: RolloutMemory
    static_fraction: float
    pool_tokens: int
    max_running: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSearch:
    """Choices that fit, fastest first, and why others were left out with how many there were of each."""

    choices: tuple[RolloutChoice, ...]
    left_out: Counter[str]


def rollout_room(ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload) -> Room:
    """What the engines' layout on `num_gpus` of `cluster` has to fit."""
    return Room(
        num_gpus=num_gpus,
        gpus_per_node=min(num_gpus, cluster.gpus_per_node),
        nvlink_domain=min(num_gpus, cluster.groups[0].gpu.nvlink_domain),
        sequences=workload.drawn_samples,
        longest_sequence_tokens=workload.longest_tokens,
        engine=ctx.job.rollout.engine,
    )


def asked_engines(ctx: PassContext, num_gpus: int) -> RolloutLayout | None:
    """The layout that the spec fixes, its engine count filled in; None under `auto`."""
    asked = ctx.job.rollout.layout
    if not isinstance(asked, RolloutLayoutSpec):
        return None
    engines = max(1, num_gpus // (asked.tp * asked.pp)) if asked.engines == "auto" else asked.engines
    return RolloutLayout(engines=engines, tp=asked.tp, pp=asked.pp, ep=asked.ep, dp_attention=asked.dp_attention)


def open_engines(
    ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload, sizes: Sizes = ANY_SIZES
) -> list[RolloutLayout]:
    """Engine layouts on `num_gpus` of `cluster` that the spec (and `sizes`) leave open."""
    room = rollout_room(ctx, cluster, num_gpus, workload)
    fixed = asked_engines(ctx, num_gpus)
    if sizes:
        return rollout_layouts_with(ctx.model, room, sizes)[0]
    if fixed is None:
        return rollout_layouts(ctx.model, room)
    return [] if any(rollout_obstacles(fixed, ctx.model, room)) else [fixed]


def sized_engines(
    ctx: PassContext,
    cluster: Cluster,
    num_gpus: int,
    workload: StepWorkload,
    *,
    resident_bytes: float,
    sizes: Sizes = ANY_SIZES,
) -> tuple[list[SizedEngines], Counter[str]]:
    """All engine layouts on `num_gpus` beside `resident_bytes` of a sleeping trainer on each GPU, and why others are none."""
    found, left_out = [], Counter[str]()
    for layout in open_engines(ctx, cluster, num_gpus, workload, sizes):
        sized = size_engines(ctx, cluster, layout, workload, resident_bytes=resident_bytes)
        if isinstance(sized, str):
            left_out[sized] += 1
        else:
            found.append(sized)
    return found, left_out


def search_rollout(
    ctx: PassContext, cluster: Cluster, num_gpus: int, workload: StepWorkload, *, resident_bytes: float
) -> RolloutSearch:
    """All of them with their prices."""
    sized, left_out = sized_engines(ctx, cluster, num_gpus, workload, resident_bytes=resident_bytes)
    return RolloutSearch(choices=fastest_first(each.simulated() for each in sized), left_out=left_out)


def fastest_first(choices: Iterable[RolloutChoice]) -> tuple[RolloutChoice, ...]:
    """Engines in order of their time."""
    return tuple(sorted(choices, key=lambda choice: (choice.rollout_s, choice.layout.tp)))


def price_engines(
    ctx: PassContext, cluster: Cluster, layout: RolloutLayout, workload: StepWorkload, *, resident_bytes: float
) -> RolloutChoice | str:
    """The price of one layout, or in a few words why it cannot hold the job."""
    sized = size_engines(ctx, cluster, layout, workload, resident_bytes=resident_bytes)
    return sized if isinstance(sized, str) else sized.simulated()


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedEngines:
    """Engines that hold the job, ready to be simulated. embedded_s: Python's share of the embedded engine's steps."""

    ctx: PassContext
    gpu: Gpu
    layout: RolloutLayout
    memory: RolloutMemory
    work: RolloutWorkload
    workload: StepWorkload
    static_fraction: float
    max_running: int
    embedded_s: float

    def simulated(self) -> RolloutChoice:
        """Their price."""
        # A cache beyond what all running requests can fill changes nothing, and equal simulations are run once.
        pool = min(self.memory.pool_tokens, self.max_running * (self.workload.longest_tokens + 1))
        time = _simulated(self.ctx.model, self.layout, self.work, self.gpu, pool, self.max_running)
        return RolloutChoice(
            layout=self.layout,
            rollout_s=time.makespan.mid + self.embedded_s,
            low_s=time.makespan.low + 0.5 * self.embedded_s,
            high_s=time.makespan.high + 4.0 * self.embedded_s,
            memory=self.memory,
            static_fraction=self.static_fraction,
            pool_tokens=self.memory.pool_tokens,
            max_running=self.max_running,
            tokens_per_s=self.workload.response_tokens / max(time.makespan.mid, 1e-9),
        )

    def floor_s(self) -> float:
        """No simulation of these engines takes less: the longest response alone, or an engine's share at its largest batch.

        A token costs least in the largest batch, and caches hold on average what half-grown responses do, long ones longer.
        """
        share = max(1, round(self.work.requests / self.layout.engines))
        batch = float(min(share, self.max_running))
        lengths = self.work.responses.sample(share)
        grown = float(np.square(lengths).sum() / lengths.sum()) / 2.0
        return FLOOR_SHARE * max(self.longest_response_s(), self._step_s(batch, grown) / batch * float(lengths.sum()))

    def longest_response_s(self) -> float:
        """Seconds of the longest response of the step if nothing else ran."""
        count = self.work.requests
        responses = self.work.responses
        longest = float(responses.quantile((count - 0.3175) / (count + 0.365))) if count > 1 else responses.mean_tokens
        return self._step_s(1.0, longest / 2.0) * longest

    def _step_s(self, batch: float, grown_tokens: float) -> float:
        """Seconds a token of each of `batch` requests takes, their prompts and `grown_tokens` of each in the cache."""
        engine = DecodeModel(
            model=self.ctx.model,
            layout=self.layout,
            gpu=self.gpu,
            profile=profile_for(self.gpu),
            weight_precision=self.work.weight_precision,
            kv_bytes=self.work.kv_bytes,
            speculation=self.work.speculation,
        )
        cached = batch * (self.work.prompt_tokens + grown_tokens)
        return float(engine.step_seconds(np.array([batch]), np.array([cached]))[0]) / self.work.speculation.accept_length


@lru_cache(maxsize=1024)
def _simulated(
    model: ModelArchitecture, layout: RolloutLayout, work: RolloutWorkload, gpu: Gpu, pool_tokens: int, max_running: int
) -> RolloutTime:
    return simulate_rollout(model, layout, work, gpu, pool_tokens=pool_tokens, max_running=max_running)


def forget_simulations() -> None:
    """Drop what has been simulated so far, for whoever times a search."""
    _simulated.cache_clear()


def size_engines(
    ctx: PassContext, cluster: Cluster, layout: RolloutLayout, workload: StepWorkload, *, resident_bytes: float
) -> SizedEngines | str:
    """One layout with its memory, or in a few words why it cannot hold the job."""
    gpu = min((group.gpu for group in cluster.groups), key=lambda each: each.usable_bytes)
    options = rollout_memory_options(ctx, gpu, layout, workload, resident_bytes=resident_bytes)
    memory = rollout_memory(ctx.model, layout, options, gpu)
    if memory.pool_tokens <= 0:
        return "weights leave no room for a KV cache"
    if memory.pool_tokens < workload.longest_tokens:
        return "the KV cache does not hold the longest sequence"
    if not memory.fits:
        return "CUDA graphs and activations do not fit beside the static share"
    embedded = ctx.job.rollout.engine == "torch"
    return SizedEngines(
        ctx=ctx,
        gpu=gpu,
        layout=layout,
        memory=embedded_memory(ctx, memory, layout, workload) if embedded else memory,
        work=rollout_workload(ctx, workload, options),
        workload=workload,
        static_fraction=options.mem_fraction_static,
        max_running=running_limit(ctx, workload, layout),
        embedded_s=EMBEDDED_STEP_S * (workload.max_response_tokens + 1) if embedded else 0.0,
    )


@dataclass(frozen=True, slots=True)
class EngineShortage:
    """Why engines do not hold the job: bytes of a GPU that are missing, and what they hold."""

    missing_bytes: float
    terms: tuple[tuple[str, float], ...]


def engine_shortage(ctx: PassContext, cluster: Cluster, layout: RolloutLayout, workload: StepWorkload) -> EngineShortage:
    """What a layout is short of: weights with one longest sequence over the static share, the rest over what is left."""
    gpu = min((group.gpu for group in cluster.groups), key=lambda each: each.usable_bytes)
    options = rollout_memory_options(ctx, gpu, layout, workload, resident_bytes=0.0)
    memory = rollout_memory(ctx.model, layout, options, gpu)
    static = max(0.0, gpu.usable_bytes - memory.outside_bytes - options.resident_bytes) * options.mem_fraction_static
    sequence = workload.longest_tokens * memory.kv_bytes_per_token / layout.dp_attention
    return EngineShortage(
        missing_bytes=max(0.0, memory.weight_bytes + sequence - static) + max(0.0, -memory.headroom_bytes),
        terms=(
            ("weights", memory.weight_bytes),
            ("one longest sequence", sequence),
            ("static share of the GPU", static),
        ),
    )


def rollout_workload(ctx: PassContext, workload: StepWorkload, options: RolloutMemoryOptions) -> RolloutWorkload:
    """What the engines generate in one step, speculation included."""
    speculative = ctx.job.rollout.speculative
    speculation = Speculation()
    if speculative != "off":
        acceptance = (ACCEPTANCE_TRAINED if speculative.train else ACCEPTANCE_FROZEN)[1]
        speculation = Speculation(
            accept_length=accept_length(acceptance, speculative.steps), draft_tokens=draft_tokens(speculative)
        )
    return RolloutWorkload(
        prompts=max(1, workload.drawn_samples // workload.samples_per_prompt),
        samples_per_prompt=workload.samples_per_prompt,
        prompt_tokens=workload.prompt_tokens,
        responses=workload.lengths,
        weight_precision=options.weight_precision,
        kv_bytes=options.kv_bytes,
        speculation=speculation,
    )


def running_limit(ctx: PassContext, workload: StepWorkload, layout: RolloutLayout) -> int:
    """Requests of one engine at a time: the spec's, or all of its share up to a limit."""
    asked = ctx.job.rollout.max_running
    share = -(-workload.drawn_samples // layout.engines)
    return min(share, MAX_RUNNING) if asked == "auto" else asked


def embedded_pool_tokens(workload: StepWorkload, layout: RolloutLayout) -> int:
    """Tokens of an embedded engine's cache: all of its share at full length, within a limit that keeps retraction in use."""
    share = -(-workload.drawn_samples // layout.engines)
    return max(workload.longest_tokens * 2, min(EMBEDDED_POOL_TOKENS, share * workload.longest_tokens))


def embedded_memory(ctx: PassContext, memory: RolloutMemory, layout: RolloutLayout, workload: StepWorkload) -> RolloutMemory:
    """What an embedded engine holds: a cache of what its batch needs, and weights a second time, prepared for exact products.

    Keys, values and prepared weights are float64 integers with a float64 scale a row (`miles_plan.kernels.exact`).
    """
    pool_tokens = min(memory.pool_tokens, embedded_pool_tokens(workload, layout))
    head_dims = [kind.mixer.head_dim for kind in ctx.model.kinds if isinstance(kind.mixer, GroupedQuery)]
    scales = 1.0 + 1.0 / (2 * min(head_dims, default=64))
    bytes_per_token = memory.kv_bytes_per_token * scales
    weight_bytes = memory.weight_bytes + 8.0 * ctx.model.params_total / layout.tp
    pool_bytes = pool_tokens * bytes_per_token
    change = pool_bytes - memory.pool_bytes + weight_bytes - memory.weight_bytes
    awake = memory.awake_bytes
    return replace(
        memory,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=bytes_per_token,
        pool_bytes=pool_bytes,
        pool_tokens=pool_tokens,
        awake_bytes=replace(awake, low=awake.low + change, mid=awake.mid + change, high=awake.high + change),
        asleep_bytes=0.0,
    )


def rollout_memory_options(
    ctx: PassContext, gpu: Gpu, layout: RolloutLayout, workload: StepWorkload, *, resident_bytes: float
) -> RolloutMemoryOptions:
    """The engine's settings: the static share is what CUDA graphs and activations leave, unless the spec sets it."""
    embedded = ctx.job.rollout.engine == "torch"
    kv_cache, speculative = ctx.job.precision.kv_cache, ctx.job.rollout.speculative
    kv_bytes = KV_BYTES.get(ctx.job.precision.rollout, 2.0) if kv_cache == "auto" else KV_BYTES[kv_cache]
    if embedded:
        kv_bytes = 8.0

    running = running_limit(ctx, workload, layout)

    def options(fraction: float) -> RolloutMemoryOptions:
        return RolloutMemoryOptions(
            weight_precision=ROLLOUT_PRECISION[ctx.job.precision.rollout],
            kv_bytes=kv_bytes,
            mem_fraction_static=fraction,
            prefill_tokens=min(PREFILL_TOKENS, int(workload.total_tokens) + 1) if embedded else PREFILL_TOKENS,
            max_running=running,
            graph_batch=0 if embedded else min(running, GRAPH_BATCH),
            resident_bytes=resident_bytes + MARGIN_FRACTION * gpu.usable_bytes,
            draft=draft_of(ctx.model, speculative.method) if speculative != "off" else None,
        )

    asked = ctx.job.rollout.memory_fraction
    if asked != "auto":
        return options(asked)
    probe = rollout_memory(ctx.model, layout, options(0.5), gpu)
    free_bytes = max(1.0, gpu.usable_bytes - probe.outside_bytes - resident_bytes - MARGIN_FRACTION * gpu.usable_bytes)
    wanted = 1.0 - (probe.graph_bytes + probe.activation_bytes) / free_bytes
    return options(min(MAX_STATIC_FRACTION, max(MIN_STATIC_FRACTION, wanted - 0.005)))
