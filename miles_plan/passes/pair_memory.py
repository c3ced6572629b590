"""Whether a trainer and rollout engines fit their GPUs and hosts together, for all rows of a split against all engines.

These are the phases that `plan_memory` writes down (train, sync, and on the host generate, train and save), asked before
anything is priced: a pair that would be refused there is not a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_plan.catalog.ffns import MoeFfn
from miles_plan.cost.columns import Floats
from miles_plan.cost.rollout_memory import RolloutMemory
from miles_plan.passes.base import PassContext
from miles_plan.passes.placements import Split
from miles_plan.passes.sync_price import staging_bytes
from miles_plan.passes.train_choices import usable_bytes
from miles_plan.passes.train_prices import PriceRows
from miles_plan.passes.workload import StepWorkload

GIB = 1 << 30
HOST_SHARE = 0.90  # the rest is the operating system's, Ray's object store's and the page cache's
PROCESS_BYTES, EMBEDDED_PROCESS_BYTES = 3 * GIB, 768 << 20  # of one rank on its host
SAVE_STAGING_BYTES = 4 * GIB  # what a rank of a cluster engine copies to its host at a time while it writes a checkpoint
SAMPLE_TOKEN_BYTES = 16  # token id, log-probs, version


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMemory:
    """Arrays of shape [rows, engines]. headroom_bytes: of a training GPU at its fullest; sleeping: the two take turns."""

    fits: NDArray[np.bool_]
    headroom_bytes: Floats
    sleeping: NDArray[np.bool_]


def pair_memory(
    ctx: PassContext,
    split: Split,
    workload: StepWorkload,
    rows: PriceRows,
    engines: Sequence[RolloutMemory],
    *,
    training_only: bool = False,
) -> PairMemory:
    """Every row beside every engine; with `training_only` the sync and the hosts are left to `plan_memory` to refuse."""
    capacity = min(usable_bytes(group) for group in split.train.cluster.groups)
    shape = (len(rows), len(engines))
    headroom = np.broadcast_to((capacity - rows.peak_bytes)[:, None], shape)
    sleeping = np.zeros(shape, dtype=bool)
    bucket = staging_bytes(ctx)
    between = (rows.static_bytes + rows.outside_bytes + bucket)[:, None]
    if split.kind == "disaggregate":
        engines_fit = np.array([_engines_sync(ctx, split, each) for each in engines], dtype=bool)[None]
        transitions = (between <= capacity) & engines_fit & _hosts_fit(ctx, split, workload, rows, sleeping)
        return PairMemory(fits=(headroom >= 0) & (transitions | training_only), headroom_bytes=headroom, sleeping=sleeping)
    awake = np.array([each.awake_bytes.mid for each in engines])[None]
    asleep = np.array([each.asleep_bytes for each in engines])[None]
    weights = np.array([each.weight_bytes + each.asleep_bytes for each in engines])[None]
    sleeping = ~(_embedded(ctx) & (headroom >= awake))  # SGLang sizes itself to all of a GPU
    headroom = headroom - np.where(sleeping, asleep, awake)
    left = (rows.weight_bytes + rows.outside_bytes + bucket)[:, None]  # gradients and optimizer leave before the sync
    transitions = np.where(sleeping, left + weights, between + awake) <= capacity
    transitions = transitions & _hosts_fit(ctx, split, workload, rows, sleeping)
    return PairMemory(fits=(headroom >= 0) & (transitions | training_only), headroom_bytes=headroom, sleeping=sleeping)


def residues_bytes(ctx: PassContext, rows: PriceRows) -> Floats:
    """What each row's trainer keeps on a GPU when its states have left: context, libraries, communicators, scratch; [n].

    Nothing, for the embedded engine: it has neither.
    """
    if ctx.job.train.engine == "torch":
        return np.zeros(len(rows))
    return rows.asleep_bytes


def _embedded(ctx: PassContext) -> bool:
    return "torch" in (ctx.job.train.engine, ctx.job.rollout.engine)


def _engines_sync(ctx: PassContext, split: Split, engine: RolloutMemory) -> bool:
    """Whether engines on GPUs of their own have room for a bucket."""
    capacity = min(usable_bytes(group) for group in split.rollout.cluster.groups)
    return engine.awake_bytes.mid + staging_bytes(ctx) <= capacity


def _hosts_fit(
    ctx: PassContext,
    split: Split,
    workload: StepWorkload,
    rows: PriceRows,
    sleeping: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Whether a node's memory holds its processes and samples, what sleeps there, and the staging of a save."""
    capacity = HOST_SHARE * min(group.node_memory_bytes for group in split.train.cluster.groups)
    ranks = min(split.train_gpus, split.train.cluster.gpus_per_node)
    engine_ranks = min(split.rollout_gpus, split.rollout.cluster.gpus_per_node)
    embedded = ctx.job.train.engine == "torch"
    both = split.kind == "colocate" and not embedded
    processes = (ranks + (engine_ranks if both else 0)) * (EMBEDDED_PROCESS_BYTES if embedded else PROCESS_BYTES)
    always = processes + samples_bytes(ctx, workload) + rows.host_bytes[:, None] * ranks
    asleep = np.where(sleeping, rows.static_bytes[:, None] * ranks, 0.0)
    staged = ranks * SAVE_STAGING_BYTES
    if embedded:
        staged = int(ctx.model.params_total * (4 + 8 + (4 if ctx.job.precision.train == "fp32" else 2)))
    return np.asarray(always + np.maximum(asleep, staged) <= capacity)


def samples_bytes(ctx: PassContext, workload: StepWorkload) -> float:
    """One step's samples in the object store, expert ids of every routed layer included where there are any."""
    moe = ctx.model.moe
    layers = sum(count for kind, count in ctx.model.layers() if isinstance(kind.ffn, MoeFfn))
    routing = layers * moe.topk * (1 if moe.experts <= 256 else 2) if moe else 0
    return workload.total_tokens * (SAMPLE_TOKEN_BYTES + routing)
