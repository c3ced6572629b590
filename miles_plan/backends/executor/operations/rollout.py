"""Rollout: prompts split over engines, responses back in request order, checked at the door, asked for once more if refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from miles_plan.backends.engine import EngineError
from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.backends.executor.engines import RolloutRank
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.digests import digest_of_batch
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, Waiting, places
from miles_plan.backends.executor.operations.samples import joined, sample_problems, share_of_engine
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import SamplingOptions
from miles_plan.ir.tasks import Rollout

DRAFT_COUNTS = ("verifications", "verified_tokens", "guesses", "right_guesses")  # of an engine's health


def generate_share(
    rank: RolloutRank, drawn: DrawnPrompts, sampling: SamplingOptions, version: int
) -> tuple[dict[str, float], SampleBatch | None]:
    """This engine's share of the prompts. Every rank of an engine generates; the first one hands the samples on."""
    requests = share_of_engine(drawn.requests, rank.index, rank.engines)
    engine = rank.serving(version)
    before = engine.health()
    batch = engine.generate(requests, sampling, min_version=version) if requests else None
    after = engine.health()
    report: dict[str, float] = {"tokens": 0 if batch is None else int(batch.response_length.sum())}
    report |= {name: after.get(name, 0) - before.get(name, 0) for name in (*DRAFT_COUNTS, "generating_s")}
    return report, batch if rank.rank == 0 else None


def accept_samples(
    host: HostTasks, drawn: DrawnPrompts, sampling: SamplingOptions, version: int, routed: bool, *shares: SampleBatch | None
) -> tuple[dict[str, Any], SampleBatch | None]:
    """Join the engines' samples and check them; the report says what is wrong, and then there are no samples."""
    try:
        batch = joined([share for share in shares if share is not None], drawn.requests)
    except EngineError as refused:
        return {"problems": [str(refused)]}, None
    problems = sample_problems(
        batch,
        drawn.requests,
        version=version,
        vocab_size=host.vocab_size,
        max_response_tokens=sampling.max_response_tokens,
        routed=routed,
    )
    if problems:
        return {"problems": problems}, None
    lengths = batch.response_length
    figures = {
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": int(lengths.max()),
        "truncated_fraction": float(1.0 - batch.stopped.mean()),
        "rollout_log_prob_mean": float(np.mean(batch.rollout_log_probs)),
        "samples": batch.num_samples,
        "tokens": batch.num_tokens,
    }
    return {"problems": [], "figures": figures, "digest": digest_of_batch(batch)}, batch


def sampled(
    context: Context, drawn: Any, sampling: SamplingOptions, version: int, *, group: str, routed: bool
) -> Waiting[tuple[Any, dict[str, Any]]]:
    """Samples for prompts, accepted, with their report. What is refused is asked for once more; then it is an EngineError."""
    engines = context.members[group]
    for attempt in (0, 1):
        calls = engines.produce(generate_share, drawn, sampling, version)
        made = yield Wait(f"{places(engines)}: generate with weights version {version}", calls)
        shares = [value for value, place in zip(calls.values, first_ranks(context, group), strict=True) if place]
        accepted = context.host.produce(accept_samples, drawn, sampling, version, routed, *shares)
        (report,) = yield Wait("host: accept samples", accepted)
        if not report["problems"]:
            report["figures"] |= draft_figures(made)
            if slowest_s := max(each["generating_s"] for each in made):
                report["figures"]["generating_s"] = slowest_s
            return accepted.values[0], report
        context.event("warning", f"{places(engines)}: samples refused", problems=report["problems"], attempt=attempt)
    raise EngineError(f"{places(engines)} returned samples that cannot be used, twice: " + "; ".join(report["problems"]))


def draft_figures(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How good the draft was, over all ranks; nothing where it proposed nothing.

    accept_length: tokens that one verification gave; accept_rate: share of right ones among the guesses put to the test.
    """
    verifications, tokens, guesses, right = (sum(report[name] for report in reports) for name in DRAFT_COUNTS)
    return {"accept_length": tokens / verifications, "accept_rate": right / guesses} if verifications else {}


def first_ranks(context: Context, group: str) -> Sequence[bool]:
    """For each rank of a rollout group, whether it is the first of its engine."""
    layout = context.flow.graph.group(group).rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    return [rank % layout.gpus_per_engine == 0 for rank in range(layout.world_size)]


def with_stops(sampling: SamplingOptions, end_token: int) -> SamplingOptions:
    """The options with the tokenizer's end of sequence, where the plan names no stop token."""
    return sampling if sampling.stop_token_ids else replace(sampling, stop_token_ids=(end_token,))


def rollout(context: Context) -> Operation:
    """Responses to the iteration's prompts, from the weights its sync delivered."""
    task = context.task
    assert isinstance(task, Rollout)
    version = context.value("weights")
    sampling = with_stops(task.sampling, context.services.end_token)
    batch, report = yield from sampled(
        context, context.drawn, sampling, version, group=task.group or "", routed=task.record_routing
    )
    return Outcome(
        values={"samples": batch, "routing": batch, "log_probs": batch, "prompts": context.drawn},
        figures={**report["figures"], "weight_version": version},
        digest=report["digest"],
        weight_version=version,
    )
