"""Seconds of a rollout, by simulating continuous batching over a length distribution on a coarse clock.

Requests wait in a line, run while slots and cache last, decode in lockstep, and leave when their length is reached.
A cache that overflows sends the requests with most left to do back to the line, where they prefill again what they had
(SGLang's retraction). The clock ticks a few hundred times whatever the number of requests: running requests are counted
by ticks left, so 16,000 of them cost what 16 do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.decode_time import DECODE_ERROR, DecodeModel, Speculation
from miles_plan.cost.interval import Interval, Term
from miles_plan.cost.lengths import LengthDistribution
from miles_plan.cost.profile import HardwareProfile, profile_for, relative_error
from miles_plan.ir.layout import RolloutLayout

Floats = NDArray[np.float64]

ADMISSION_S = 0.28e-3
"""Host time of a request's way into an engine and out of it, one after another (measured: 512 requests of 8 tokens take 0.24 s
on SGLang 0.5.16, of which prefill and decode explain 0.09)."""
TICKS = 384
"""Clock ticks a simulation aims at; a longest request gets between 32 and 192 of them."""
ADMISSION_RESERVE = 0.35
"""Share of its expected response that the scheduler sets aside for a request before it admits it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutWorkload:
    """One rollout: prompts x samples_per_prompt requests; samples of one prompt share its cached prefix."""

    prompts: int
    samples_per_prompt: int
    prompt_tokens: float
    responses: LengthDistribution
    weight_precision: str = "bf16"
    kv_bytes: float = 2.0
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.samples_per_prompt < 1 or self.prompt_tokens <= 0:
            raise ValueError("a rollout needs at least one prompt, one sample of it, and one prompt token")

    @property
    def requests(self) -> int:
        """Responses to generate."""
        return self.prompts * self.samples_per_prompt


@dataclass(frozen=True, slots=True)
class RolloutTime:
    """What a rollout takes.

    makespan: seconds until the last response. tail_s: seconds of it in which an engine runs at less than an eighth of
    its largest batch. retractions: requests sent back for want of cache, all engines. tokens_per_s_per_gpu: generated.
    """

    makespan: Interval
    prefill_s: float
    decode_s: float
    tail_s: float
    retractions: float
    tokens_per_s_per_gpu: float
    mean_batch: float


def simulate_rollout(
    model: ModelArchitecture,
    layout: RolloutLayout,
    workload: RolloutWorkload,
    gpu: Gpu,
    pool_tokens: int,
    max_running: int = 256,
    profile: HardwareProfile | None = None,
) -> RolloutTime:
    """Simulate one engine's share with the longest response of the whole rollout in it.

    Args:
        pool_tokens: tokens the cache of one engine holds (`rollout_memory`).
        max_running: requests one engine runs at once.

    Raises:
        ValueError: the pool cannot hold a single longest request.
    """
    longest = workload.prompt_tokens + workload.responses.quantile(1.0)
    if not _endless_cache(model) and pool_tokens < longest:
        raise ValueError(f"a cache of {pool_tokens} tokens cannot hold one request of {float(longest):.0f}")
    known = profile or profile_for(gpu)
    engine = DecodeModel(
        model=model,
        layout=layout,
        gpu=gpu,
        profile=known,
        weight_precision=workload.weight_precision,
        kv_bytes=workload.kv_bytes,
        speculation=workload.speculation,
    )
    share = max(1, round(workload.requests / layout.engines))
    lengths = _engine_lengths(workload, share)
    pool = float("inf") if _endless_cache(model) else float(pool_tokens)
    run = _Simulation(engine, workload, lengths, pool, max_running).run()
    generated = workload.requests * workload.responses.mean_tokens
    error = relative_error(DECODE_ERROR, known, engine.deciding_constants)
    admission_s = ADMISSION_S * known.host_scale * share
    terms = (
        Term("admission", admission_s),
        Term("prefill", run.prefill_s),
        Term("decode", run.decode_s - run.tail_s),
        Term("tail", run.tail_s),
    )
    span = admission_s + run.prefill_s + run.decode_s
    return RolloutTime(
        makespan=Interval(span / (1 + error), span, span * (1 + error), "simulated", terms),
        prefill_s=run.prefill_s,
        decode_s=run.decode_s,
        tail_s=run.tail_s,
        retractions=float(run.retractions) * layout.engines,
        tokens_per_s_per_gpu=generated / span / layout.world_size,
        mean_batch=run.batch_ticks / max(run.ticks, 1),
    )


def _endless_cache(model: ModelArchitecture) -> bool:
    """Whether no layer's cache grows with the sequence."""
    return all(not kind.mixer or not kind.mixer.cache_elements_per_token for kind in model.kinds)


def _engine_lengths(workload: RolloutWorkload, share: int) -> Floats:
    """Typical lengths of one engine in a low-discrepancy order, the rollout's expected longest among them."""
    lengths = workload.responses.sample(share)
    count = workload.requests
    lengths[-1] = workload.responses.quantile((count - 0.3175) / (count + 0.365)) if count > 1 else lengths[-1]
    order = np.argsort((np.arange(share) * 0.6180339887498949) % 1.0)
    return lengths[order]


@dataclass(slots=True)
class _Run:
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tail_s: float = 0.0
    retractions: float = 0.0
    batch_ticks: float = 0.0
    ticks: int = 0


class _Simulation:
    """State of one engine on the coarse clock; arrays are indexed by ticks left to run."""

    def __init__(
        self, engine: DecodeModel, workload: RolloutWorkload, lengths: Floats, pool_tokens: float, max_running: int
    ) -> None:
        self.engine, self.workload, self.pool = engine, workload, pool_tokens
        self.max_running = max_running
        slots = min(float(max_running), pool_tokens / (workload.prompt_tokens + float(lengths.mean())))
        waves = 1.0 + float(lengths.sum()) / float(lengths.max()) / max(1.0, min(slots, float(len(lengths))))
        self.tick_tokens = max(1.0, float(lengths.max()) / min(192.0, max(32.0, TICKS / waves)))
        self.left = np.maximum(1, np.round(lengths / self.tick_tokens)).astype(np.int64)
        self.mean_tokens = float(lengths.mean())
        self.next = 0
        size = int(self.left.max()) + 1
        self.running, self.generated = np.zeros(size), np.zeros(size)
        self.waiting, self.waited_tokens = np.zeros(size), np.zeros(size)
        self.done = _Run()
        self.steps: list[tuple[float, float, float]] = []
        self.prefills: list[tuple[float, float]] = []

    def run(self) -> _Run:
        while self.next < len(self.left) or self.running.sum() > 0 or self.waiting.sum() > 0:
            self._admit()
            self._retract()
            count = float(self.running.sum())
            cached = count * self.workload.prompt_tokens + float(self.generated.sum())
            self.steps.append((count, cached + 0.5 * self.tick_tokens * count, self.tick_tokens))
            self.generated += self.running * self.tick_tokens
            self.running[:-1], self.generated[:-1] = self.running[1:], self.generated[1:].copy()
            self.running[-1] = self.generated[-1] = 0.0
            self.running[0] = self.generated[0] = 0.0
        self._price()
        return self.done

    def _admit(self) -> None:
        self._resume()
        slots = self.max_running - self.running.sum()
        waiting = len(self.left) - self.next
        if slots < 1 or not waiting:
            return
        need = self.workload.prompt_tokens + ADMISSION_RESERVE * self.mean_tokens
        room = float((self.pool - self._cached()) / need) if np.isfinite(self.pool) else float(waiting)
        count = int(min(slots, waiting, max(room, 0.0 if self.running.sum() else 1.0)))
        if count < 1:
            return
        np.add.at(self.running, self.left[self.next : self.next + count], 1.0)
        self.next += count
        fresh = count / self.workload.samples_per_prompt * self.workload.prompt_tokens
        self.prefills.append((fresh, self.workload.prompt_tokens))

    def _resume(self) -> None:
        """Retracted requests go first, all that fit, and prefill their prompt and what they had generated."""
        count = float(self.waiting.sum())
        if not count:
            return
        tokens = count * self.workload.prompt_tokens + float(self.waited_tokens.sum())
        each = tokens / count
        reserve = ADMISSION_RESERVE * self.mean_tokens
        fits = min(self.max_running - self.running.sum(), (self.pool - self._cached()) / (each + reserve), count)
        if self.running.sum() == 0:
            fits = max(fits, min(1.0, count))
        if fits <= 0:
            return
        share = fits / count
        self.running += self.waiting * share
        self.generated += self.waited_tokens * share
        self.waiting *= 1 - share
        self.waited_tokens *= 1 - share
        if self.waiting.sum() < 1e-6:
            self.waiting[:] = self.waited_tokens[:] = 0.0
        self.prefills.append((tokens * share, each))

    def _retract(self) -> None:
        over = self._cached() + self.running.sum() * self.tick_tokens - self.pool
        count = float(self.running.sum())
        if over <= 0 or count <= 1:
            return
        each = max(1.0, self._cached() / count + self.tick_tokens)
        out = float(min(over / each, count - 1.0))
        share = out / count
        self.waiting += self.running * share
        self.waited_tokens += self.generated * share
        self.running *= 1 - share
        self.generated *= 1 - share
        self.done.retractions += out

    def _cached(self) -> float:
        return float(self.running.sum() * self.workload.prompt_tokens + self.generated.sum())

    def _price(self) -> None:
        """All steps at once, their batches, caches and tokens, and all prefills."""
        self.done.prefill_s = float(self.engine.prefill_seconds(*np.array(self.prefills).T).sum())
        batch, cached, tokens = np.array(self.steps).T
        steps = tokens / self.workload.speculation.accept_length
        seconds = self.engine.step_seconds(batch, cached) * steps
        self.done.decode_s = float(seconds.sum())
        self.done.tail_s = float(seconds[batch < batch.max() / 8].sum())
        self.done.batch_ticks, self.done.ticks = float(batch.sum()), len(batch)
