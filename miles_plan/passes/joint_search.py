"""The joint search: placement x trainer's choice x engines' choice, exact within the enumerated space.

A step's time is the trainer's part plus the rollout's part plus the sync between them (or their maximum, when they overlap).
The two halves are priced apart; pairs are then visited cheapest first, and a pair is not visited when its halves alone are
already slower than the best whole found: the sync only adds. So the result is that of brute force
(tests/passes/test_joint_search.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from miles_plan.cost.profile import profile_for
from miles_plan.cost.weight_sync import offload_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.number_formats import COST_PRECISION
from miles_plan.passes.rollout_choices import RolloutChoice, RolloutSearch, search_rollout
from miles_plan.passes.staleness import staleness_of
from miles_plan.passes.sync_price import bucket_size_bytes, sync_price
from miles_plan.passes.train_choices import TrainChoice, TrainSearch, search_train, usable_bytes
from miles_plan.passes.workload import StepWorkload
from miles_plan.spec.execution import SplitPlacement

PlacementKind = Literal["colocate", "disaggregate"]
MAX_SPLITS = 32  # ways to divide the GPUs that are priced; nodes are kept whole where there are several
KEPT_CANDIDATES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which GPUs train and which generate: the same ones in turn, or apart."""

    kind: PlacementKind
    train_gpus: int
    rollout_gpus: int

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return self.train_gpus if self.kind == "colocate" else self.train_gpus + self.rollout_gpus

    def __str__(self) -> str:
        """As people say it."""
        if self.kind == "colocate":
            return f"colocate on {self.train_gpus}"
        return f"{self.rollout_gpus} rollout + {self.train_gpus} train"


@dataclass(frozen=True, slots=True, kw_only=True)
class JointChoice:
    """One whole answer with its price. sleeping: engines offload while the other runs (colocated only)."""

    split: Split
    train: TrainChoice
    rollout: RolloutChoice | None
    sleeping: bool
    sync_s: float
    transition_s: float
    step_s: float
    headroom_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSearch:
    """The best answer of each split, best first; why others were left out; and the trainer nearest to fitting."""

    best: tuple[JointChoice, ...]
    trainers: TrainSearch | None  # all that the chosen split's GPUs could do
    left_out: Counter[str]
    nearest: TrainChoice | None
    pairs_visited: int


def splits(ctx: PassContext) -> Iterator[Split]:
    """The placements that the spec leaves open, colocation first."""
    num_gpus = ctx.cluster.num_gpus
    asked = ctx.job.placement
    overlapping = staleness_of(ctx)[1] > 0
    if asked == "colocate" or (asked == "auto" and not overlapping):
        yield Split(kind="colocate", train_gpus=num_gpus, rollout_gpus=num_gpus)
    if isinstance(asked, SplitPlacement):
        if 0 < asked.rollout_gpus < num_gpus:
            yield Split(kind="disaggregate", train_gpus=num_gpus - asked.rollout_gpus, rollout_gpus=asked.rollout_gpus)
    elif asked in ("auto", "disaggregate"):
        unit = ctx.cluster.gpus_per_node if ctx.cluster.num_nodes > 1 else 1
        sizes = range(unit, num_gpus, unit)
        stride = max(1, -(-len(sizes) // MAX_SPLITS))
        for rollout_gpus in sizes[stride - 1 :: stride]:
            yield Split(kind="disaggregate", train_gpus=num_gpus - rollout_gpus, rollout_gpus=rollout_gpus)


def search_jointly(ctx: PassContext, workload: StepWorkload) -> JointSearch:
    """Price every split that can still win and keep the best answer of each.

    A split is passed over when a bound on its step is already above the best: engines on fewer GPUs are not faster, and no
    trainer beats its matrix products at the rate the profile reaches. Splits are visited from most rollout GPUs to fewest, so
    that one engine search that loses rules out all that would have fewer.
    """
    best: list[JointChoice] = []
    left_out: Counter[str] = Counter()
    nearest: TrainChoice | None = None
    trainers: dict[Split, TrainSearch] = {}
    visited = 0
    fastest_s, slowest_losing_gpus = float("inf"), 0
    everything = sorted(splits(ctx), key=lambda split: (split.kind, -split.rollout_gpus))
    overlapping = staleness_of(ctx)[1] > 0
    for split in everything:
        floor_s = train_floor_s(ctx, split.train_gpus, workload)
        if floor_s >= fastest_s or split.rollout_gpus <= slowest_losing_gpus:
            left_out["slower than the best by bound"] += 1
            continue
        if split.kind == "disaggregate" and fastest_s < float("inf"):
            engines = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=0.0)
            rollout_s = engines.choices[0].rollout_s if engines.choices else float("inf")
            if _bound_s(rollout_s, train_floor_s(ctx, ctx.cluster.num_gpus, workload), overlapping) >= fastest_s:
                slowest_losing_gpus = max(slowest_losing_gpus, split.rollout_gpus)
            if _bound_s(rollout_s, floor_s, overlapping) >= fastest_s:
                left_out["slower than the best by bound"] += 1
                continue
        train = search_train(ctx, ctx.cluster, split.train_gpus, workload)
        trainers[split] = train
        left_out += train.left_out
        if train.smallest is not None and (nearest is None or train.smallest.peak_bytes < nearest.peak_bytes):
            nearest = train.smallest
        found, pairs = _best_of_split(ctx, split, train, workload, left_out)
        visited += pairs
        if found is not None:
            best.append(found)
            fastest_s = min(fastest_s, found.step_s)
    best.sort(key=lambda choice: (choice.step_s, -choice.headroom_bytes))
    chosen = trainers[best[0].split] if best else None
    return JointSearch(best=tuple(best), trainers=chosen, left_out=left_out, nearest=nearest, pairs_visited=visited)


def _bound_s(rollout_s: float, train_s: float, overlapping: bool) -> float:
    return max(rollout_s, train_s) if overlapping else rollout_s + train_s


def train_floor_s(ctx: PassContext, num_gpus: int, workload: StepWorkload) -> float:
    """No trainer on `num_gpus` is faster: forward and backward products of the active weights at the profile's best rate.

    Six operations an active weight and token for the update, two for each log-prob pass (arXiv 2001.08361).
    """
    gpu = max((group.gpu for group in ctx.cluster.groups), key=lambda each: max(each.flops.values()))
    precision = COST_PRECISION[ctx.job.precision.train]
    rate = gpu.rate(precision) * max(profile_for(gpu).gemm_fraction.values())
    flops = (6.0 + 2.0) * ctx.model.params_active_nonembedding * workload.total_tokens
    return float(flops / rate / num_gpus)


def _best_of_split(
    ctx: PassContext, split: Split, train: TrainSearch, workload: StepWorkload, left_out: Counter[str]
) -> tuple[JointChoice | None, int]:
    """The fastest pair of one split, staying resident where both fit (embedded engines), else taking turns asleep."""
    if not train.choices:
        return None, 0
    if split.kind == "disaggregate":
        rollout = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=0.0)
        left_out.update(rollout.left_out)
        return best_pair(ctx, split, train, rollout, sleeping=False)
    if ctx.job.rollout.engine == "torch" and ctx.job.train.engine == "torch":
        resident = train.choices[0].static_bytes
        rollout = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=resident)
        together, pairs = best_pair(ctx, split, train, rollout, sleeping=False)
        if together is not None:
            return together, pairs
    residue = sleeping_trainer_bytes(ctx, train.choices[0])
    rollout = search_rollout(ctx, ctx.cluster, split.rollout_gpus, workload, resident_bytes=residue)
    left_out.update(rollout.left_out)
    return best_pair(ctx, split, train, rollout, sleeping=True)


def sleeping_trainer_bytes(ctx: PassContext, choice: TrainChoice) -> float:
    """What a trainer that has offloaded everything keeps on a GPU: context, communicators, and what is not static in them.

    Nothing, for the embedded engine: it has neither.
    """
    if ctx.job.train.engine == "torch":
        return 0.0
    return max(0.0, min(choice.peak_bytes - choice.static_bytes, 4.0 * (1 << 30)))


def best_pair(
    ctx: PassContext, split: Split, train: TrainSearch, rollout: RolloutSearch, *, sleeping: bool
) -> tuple[JointChoice | None, int]:
    """The fastest pair of a split, with the number of pairs looked at."""
    price = _pricer(ctx, split, sleeping)
    overlapping = staleness_of(ctx)[1] > 0
    best: JointChoice | None = None
    visited = 0
    fastest_rollout_s = rollout.choices[0].rollout_s if rollout.choices else float("inf")
    for one in train.choices:
        train_s = train_part_s(ctx, one)
        if best is not None and _bound_s(fastest_rollout_s, train_s, overlapping) >= best.step_s:
            continue  # trainers are sorted by update and one pass; with more passes the order may differ, so go on
        for other in rollout.choices:
            if best is not None and _bound_s(other.rollout_s, train_s, overlapping) >= best.step_s:
                break  # engines are sorted: the rest of them are slower still
            visited += 1
            whole = price(one, other)
            if whole is not None and (best is None or whole.step_s < best.step_s):
                best = whole
    return best, visited


def train_part_s(ctx: PassContext, choice: TrainChoice) -> float:
    """Seconds a step spends on the trainer: the old policy's log-probs, a reference's where there is one, and the update."""
    reference = 1 if ctx.job.algorithm.kl_loss_coef or ctx.job.algorithm.kl_reward_coef else 0
    # A teacher's pass costs as the policy's, by active weights: close enough to choose by; `price_tasks` prices it properly.
    teacher = ctx.teacher.params_active / ctx.model.params_active if ctx.teacher else 0.0
    return choice.step_s + choice.log_prob_s * (1 + reference + teacher)


def _pricer(ctx: PassContext, split: Split, sleeping: bool) -> Callable[[TrainChoice, RolloutChoice], JointChoice | None]:
    """A function that prices a pair, None where the two do not fit one GPU together."""
    capacity = min(usable_bytes(group) for group in ctx.cluster.groups)
    overlapping = staleness_of(ctx)[1] > 0

    @cache
    def sync_s_of(train: TrainLayout, rollout: RolloutLayout) -> float:
        return sync_price_s(ctx, split, train, rollout)

    def price(train: TrainChoice, rollout: RolloutChoice) -> JointChoice | None:
        beside = 0.0
        if split.kind == "colocate":
            beside = rollout.memory.asleep_bytes if sleeping else rollout.memory.awake_bytes.mid
        headroom = capacity - train.peak_bytes - beside
        if headroom < 0:
            return None
        sync_s = sync_s_of(train.layout, rollout.layout)
        transition_s = 0.0
        if sleeping:
            moved = train.static_bytes + rollout.memory.weight_bytes
            transition_s = 2.0 * offload_time(moved, ctx.cluster).mid
        train_s = train_part_s(ctx, train)
        if overlapping:
            step_s = max(train_s, rollout.rollout_s + sync_s)
        else:
            step_s = train_s + rollout.rollout_s + sync_s + transition_s
        return JointChoice(
            split=split,
            train=train,
            rollout=rollout,
            sleeping=sleeping,
            sync_s=sync_s,
            transition_s=transition_s,
            step_s=step_s,
            headroom_bytes=headroom,
        )

    return price


def sync_price_s(ctx: PassContext, split: Split, train: TrainLayout, rollout: RolloutLayout) -> float:
    """Seconds of one weight sync with the placement's usual transport; `sync_weights` compares the others."""
    transport: Transport = "cuda_ipc" if split.kind == "colocate" else "nccl_broadcast"
    if ctx.job.train.engine == "torch":
        transport = "shared_memory"
    return sync_price(ctx, train, rollout, transport, bucket_size_bytes(ctx)).mid
