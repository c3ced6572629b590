"""The boundary where samples come in: requests are split over engines, results put back in order and checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_plan.backends.engine import EngineError, Request
from miles_plan.data.batch import SampleBatch, concatenate


class RefusedSamplesError(EngineError):
    """An engine returned something that does not answer what it was asked: lists every way in which it does not."""


def share_of_engine(requests: Sequence[Request], engine: int, engines: int) -> list[Request]:
    """The requests of one engine: whole prompts, contiguous, so that samples of a prompt share its prefix.

    A pure function, so that engine and driver agree without talking; the shares joined in engine order are the requests.
    """
    prompts = list(dict.fromkeys(request.prompt_id for request in requests))
    first, last = (len(prompts) * number // engines for number in (engine, engine + 1))
    mine = set(prompts[first:last])
    return [request for request in requests if request.prompt_id in mine]


def joined(batches: Sequence[SampleBatch], requests: Sequence[Request]) -> SampleBatch:
    """The engines' batches in the order of the requests. RefusedSamplesError for samples missing, repeated or unasked for."""
    batch = concatenate([each for each in batches if each.num_samples]) if len(batches) > 1 else batches[0]
    wanted = [request.sample_id for request in requests]
    found = [int(sample_id) for sample_id in batch.sample_id]
    if found == wanted:
        return batch
    if sorted(found) != sorted(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise RefusedSamplesError(
            f"{len(wanted)} samples were asked for, {len(found)} came back: missing {missing[:5]}, not asked for {extra[:5]}, "
            f"{len(found) - len(set(found))} repeated"
        )
    place = {sample_id: index for index, sample_id in enumerate(found)}
    return batch.select([place[sample_id] for sample_id in wanted])


def sample_problems(
    batch: SampleBatch, requests: Sequence[Request], *, version: int, vocab_size: int, max_response_tokens: int, routed: bool
) -> list[str]:
    """What is wrong with samples that are in the order of their requests. Empty when they can be trained on."""
    found = batch.problems()
    if found:
        return found
    prompt_lengths = np.array([len(request.prompt) for request in requests])
    if not np.array_equal(batch.prompt_length, prompt_lengths):
        return ["prompts do not have the length they were sent with"]
    wrong = [r.sample_id for i, r in enumerate(requests) if tuple(batch.sequence(i)[: len(r.prompt)].tolist()) != r.prompt]
    if wrong:
        found.append(f"{len(wrong)} samples do not start with their prompt: {wrong[:5]}")
    if batch.num_tokens and not (int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < vocab_size):
        found.append(f"token ids outside the vocabulary of {vocab_size}: {int(batch.tokens.min())}..{int(batch.tokens.max())}")
    if (batch.response_length < 1).any():
        found.append(f"{int((batch.response_length < 1).sum())} samples are empty")
    if (batch.response_length > max_response_tokens).any():
        found.append(f"a response of {int(batch.response_length.max())} tokens, the limit is {max_response_tokens}")
    log_probs = batch.rollout_log_probs
    unknown = int((~np.isfinite(log_probs)).sum())
    if unknown:
        found.append(f"{unknown} of {log_probs.size} log-probs are not finite")
    if (log_probs > 0).any():
        found.append(
            f"{int((log_probs > 0).sum())} of {log_probs.size} log-probs are above 0, by {log_probs[log_probs > 0].max():.3g}"
        )
    if (batch.weight_version != version).any():
        versions = sorted({int(each) for each in np.unique(batch.weight_version)})
        found.append(f"sampled with weight versions {versions}, asked for {version}")
    if routed and batch.routing is None:
        found.append("no routing was recorded")
    return found
