"""Advantages and importance weights: columns computed from columns, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles_plan.algorithms.advantages import compute_advantages
from miles_plan.algorithms.importance_correction import importance_correction
from miles_plan.backends.executor.operations.batches import columns_of
from miles_plan.backends.executor.operations.digests import digest_of_arrays
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.tasks import Advantage, Correct

# What the correction bridges counts samples of older weights; the plain names belong to the comparison, which does not.
RENAMED = {
    "max_abs_logprob_diff": "corrected_max_abs_log_prob_diff",
    "mean_abs_logprob_diff": "corrected_mean_abs_log_prob_diff",
}


def advantages_of(
    host: Any, task: Advantage, samples: SampleBatch, names: tuple[str, ...], *columns: Array
) -> tuple[dict[str, Any], Array]:
    """One advantage a response token, float32 [R]; NaN for samples whose reward was dropped, which no group counts."""
    assert task.estimator != "distillation", "refused before the run"
    batch = samples.with_columns(**dict(zip(names, columns, strict=True)))
    kept = np.flatnonzero(~np.isnan(batch.columns["reward"])) if "reward" in batch.columns else np.arange(batch.num_samples)
    advantages = np.full(len(batch.rollout_log_probs), np.nan, dtype=np.float32)
    advantages[ragged_rows(batch.response_start[kept], batch.response_length[kept])] = compute_advantages(
        batch.select(kept),
        task.estimator,
        normalize_std=task.normalize_std,
        kl_reward_coef=task.kl_reward_coef,
        gamma=task.gamma,
        gae_lambda=task.gae_lambda,
    )
    figures = {"advantage_abs_mean": float(np.nanmean(np.abs(advantages))) if len(kept) else 0.0}
    return {"digest": digest_of_arrays({"advantages": advantages}), "figures": figures}, advantages


def weights_of(
    host: Any, task: Correct, samples: SampleBatch, names: tuple[str, ...], *columns: Array
) -> tuple[dict[str, Any], Array]:
    """One importance weight a response token, float32 [R], from the trainer's and the rollout's log-probs."""
    trainer = dict(zip(names, columns, strict=True))["old_log_probs"]
    found = importance_correction(
        trainer,
        samples.rollout_log_probs,
        samples.response_length,
        method=task.method,
        level=task.level,
        clip_low=task.clip_low,
        clip_high=task.clip_high,
    )
    figures = {RENAMED.get(name, name): figure for name, figure in found.metrics.items()}
    return {"digest": digest_of_arrays({"weights": found.weights}), "figures": figures}, found.weights


def advantage(context: Context) -> Operation:
    """Rewards, and where asked log-probs and values, to advantages."""
    names, columns = columns_of(context)
    calls = context.host.produce(advantages_of, context.task, context.value("samples"), names, *columns)
    (report,) = yield Wait("host: compute advantages", calls)
    return Outcome(values={"advantages": calls.values[0]}, figures=report["figures"], digest=report["digest"])


def correct(context: Context) -> Operation:
    """The trainer's log-probs against the rollout's, to importance weights."""
    names, columns = columns_of(context)
    calls = context.host.produce(weights_of, context.task, context.value("samples"), names, *columns)
    (report,) = yield Wait("host: compute importance weights", calls)
    return Outcome(values={"importance_weights": calls.values[0]}, figures=report["figures"], digest=report["digest"])
