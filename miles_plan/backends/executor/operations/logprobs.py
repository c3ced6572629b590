"""Log-probs by a forward pass of the trainer, and the comparison with what the rollout said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_plan.backends.engine import RankLogProbs
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.operations.batches import assembled
from miles_plan.backends.executor.operations.digests import digest_of_arrays
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, places
from miles_plan.backends.executor.operations.routing import RoutingRecord
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.tasks import Logprobs, ReplayRouting


def rank_log_probs(
    rank: TrainRank, task: Logprobs, version: int, samples: SampleBatch, routing: RoutingRecord | None
) -> tuple[dict[str, int], RankLogProbs]:
    """This rank's share of the log-probs of `samples`."""
    batch = assembled(samples, routing, (), ())
    engine = rank.at(version) if task.model == "policy" else rank.engine
    share = engine.log_probs(batch, model=task.model, temperature=task.temperature, replay_routing=task.replay_routing)
    report = {
        "routing_mismatches": share.routing_mismatches,
        "routing_compared": share.routing_compared,
        "stale_tokens": int((samples.weight_version != version).sum()),
    }
    return report, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Trainer against rollout, over tokens that the very weights the trainer holds have sampled."""

    tokens_compared: int
    max_abs_diff: float
    mean_abs_diff: float
    mismatches: int
    worst_sample: int | None
    worst_token: int | None  # of its response, counted from 0


def assemble_log_probs(
    host: Any, version: int, compare: bool, samples: SampleBatch, *shares: RankLogProbs
) -> tuple[dict[str, Any], Array]:
    """All ranks' shares as one column, float32 [R], with its digest, the mean entropy and the comparison where asked."""
    log_probs, entropy = joined_shares(samples, shares)
    comparison = compare_log_probs(samples, log_probs, version) if compare else None
    report = {
        "digest": digest_of_arrays({"log_probs": log_probs}),
        "entropy": float(entropy.mean()) if len(entropy) else 0.0,
        "comparison": comparison,
    }
    return report, log_probs


def joined_shares(samples: SampleBatch, shares: Sequence[RankLogProbs]) -> tuple[Array, Array]:
    """Log-probs and entropy of every response token, float32 [R] each. ValueError when a sample has none or two."""
    total = len(samples.rollout_log_probs)
    log_probs, entropy = np.full(total, np.nan, dtype=np.float32), np.zeros(total, dtype=np.float32)
    seen = np.zeros(samples.num_samples, dtype=np.int64)
    for share in shares:
        if not len(share.sample_index):
            continue
        rows = ragged_rows(samples.response_start[share.sample_index], samples.response_length[share.sample_index])
        log_probs[rows] = share.log_probs
        if len(share.entropy):
            entropy[rows] = share.entropy
        np.add.at(seen, share.sample_index, 1)
    if (seen != 1).any():
        raise ValueError(f"{int((seen == 0).sum())} samples without log-probs, {int((seen > 1).sum())} with more than one")
    return log_probs, entropy


def compare_log_probs(samples: SampleBatch, log_probs: Array, version: int) -> Comparison:
    """Compare with the rollout's, where the weights were the same: a token of older weights has another log-prob by right."""
    same = samples.weight_version == version
    difference = np.abs(log_probs[same].astype(np.float64) - samples.rollout_log_probs[same].astype(np.float64))
    difference = np.where(np.isnan(difference), np.inf, difference)
    worst = token = None
    if len(difference) and difference.max() > 0:
        at = int(np.flatnonzero(same)[int(np.argmax(difference))])
        sample = int(np.searchsorted(samples.response_start, at, side="right")) - 1
        worst, token = int(samples.sample_id[sample]), at - int(samples.response_start[sample])
    return Comparison(
        tokens_compared=int(same.sum()),
        max_abs_diff=float(difference.max(initial=0.0)),
        mean_abs_diff=float(difference.mean()) if len(difference) else 0.0,
        mismatches=int((difference > 0).sum()),
        worst_sample=worst,
        worst_token=token,
    )


def logprobs(context: Context) -> Operation:
    """Every rank forwards its share; the host puts them together. RunError where the run must not go on."""
    task = context.flow.tasks[context.instance.task]
    assert isinstance(task, Logprobs)
    version, samples, routing = context.state.trainer_version, context.value("samples"), context.value("routing")
    ranks = context.group.produce(rank_log_probs, task, version, samples, routing)
    reports = yield Wait(f"{places(context.group)}: log-probs under the {task.model}", ranks)
    host = context.host.produce(assemble_log_probs, version, task.compare_with_rollout, samples, *ranks.values)
    (report,) = yield Wait("host: put log-probs together", host)
    figures: dict[str, float] = {}
    if task.model == "policy":
        figures["entropy"] = report["entropy"]
    if task.replay_routing:
        figures |= _judged_routing(context, reports)
    if report["comparison"] is not None:
        if _too_far(task, report["comparison"]):
            again = context.group.produce(rank_log_probs, task, version, samples, routing)
            yield Wait(f"{places(context.group)}: the same log-probs again, to see which side is at fault", again)
            repeated = context.host.call(differing_log_probs, samples, host.values[0], *again.values)
            (changed,) = yield Wait("host: compare the two", repeated)
            raise _refusal(context, task, report["comparison"], changed)
        figures |= _compared(report["comparison"])
    return Outcome(values={"log_probs": host.values[0]}, figures=figures, digest=report["digest"], weight_version=version)


def differing_log_probs(host: Any, samples: SampleBatch, first: Array, *shares: RankLogProbs) -> int:
    """How many log-probs have other bits when the trainer is asked a second time; a NaN that comes again is no other."""
    again, _ = joined_shares(samples, shares)
    return int((again.view(np.uint32) != first.view(np.uint32)).sum())


def _too_far(task: Logprobs, found: Comparison) -> bool:
    return task.max_log_prob_diff is not None and not found.max_abs_diff <= task.max_log_prob_diff


def _refusal(context: Context, task: Logprobs, found: Comparison, changed: int) -> RunError:
    twice = f"gives {changed} other log-probs: it does not repeat itself" if changed else "gives the same log-probs"
    return RunError(
        "MP502",
        f"{context.instance}: rollout and trainer differ by {found.max_abs_diff:.3g} in the log-prob of a token, "
        f"the plan allows {task.max_log_prob_diff:.3g}; {found.mismatches} of {found.tokens_compared} tokens differ, "
        f"the worst is token {found.worst_token} of the response of sample {found.worst_sample}; "
        f"asked again, the trainer {twice}",
        help="set precision.alignment to 'corrected' to train with importance weights, or 'off' to only watch it",
    )


def _compared(found: Comparison) -> dict[str, float]:
    return {
        "max_abs_log_prob_diff": found.max_abs_diff,
        "mean_abs_log_prob_diff": found.mean_abs_diff,
        "log_prob_mismatches": found.mismatches,
        "tokens_compared": found.tokens_compared,
    }


def _judged_routing(context: Context, reports: Sequence[dict[str, int]]) -> dict[str, float]:
    """Where the trainer's router would have chosen otherwise. Of samples of older weights it may, so these are only counted."""
    mismatches = sum(report["routing_mismatches"] for report in reports)
    compared = sum(report["routing_compared"] for report in reports)
    if any(report["stale_tokens"] for report in reports):
        return {"stale_routing_mismatches": mismatches, "stale_routing_compared": compared}
    limits = [task.max_mismatch_fraction for task in tasks_of(context.flow.graph, ReplayRouting)]
    fraction = mismatches / compared if compared else 0.0
    if limits and fraction > min(limits):
        raise RunError(
            "MP503",
            f"{context.instance}: the trainer's own router disagrees with the rollout on {mismatches} of {compared} "
            f"(token, layer) pairs, {fraction:.2%}; the plan allows {min(limits):.2%}",
            help="the layer map, the weights or the kernels differ between rollout and trainer",
        )
    return {"routing_mismatches": mismatches, "routing_compared": compared}
