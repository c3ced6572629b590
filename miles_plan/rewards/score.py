"""Scoring batches: built-in rewards in this process, the user's in killable workers, failures scored by one policy."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_plan.data.batch import SampleBatch
from miles_plan.data.prompts import Prompt
from miles_plan.data.tokenizer import Tokenizer
from miles_plan.rewards.outcome import Outcome, RewardFunction, RewardItem, call_reward
from miles_plan.rewards.pool import RewardPool
from miles_plan.rewards.registry import LocatedReward, load_built_in, locate
from miles_plan.rewards.report import FailurePolicy, RewardReport, report_of
from miles_plan.rewards.worker_link import PoolLimits


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """An open reward: a function that runs here, or a pool of workers. Close it, or use it in a `with`."""

    located: LocatedReward
    policy: FailurePolicy
    function: RewardFunction | None
    pool: RewardPool | None

    def __enter__(self) -> Scorer:
        """The scorer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def score(self, items: Sequence[RewardItem]) -> RewardReport:
        """Score items; never raises for what a reward does. Under `fail` see the report's `must_stop`."""
        start = time.perf_counter()
        outcomes = self.pool.outcomes(items) if self.pool is not None else self._here(items)
        return report_of(self.located.name, outcomes, self.policy, time.perf_counter() - start)

    def close(self) -> None:
        """End the workers, if there are any."""
        if self.pool is not None:
            self.pool.close()

    def _here(self, items: Sequence[RewardItem]) -> list[Outcome]:
        assert self.function is not None
        return [call_reward(self.function, item) for item in items]


def open_scorer(
    reward: str,
    *,
    limits: PoolLimits,
    policy: FailurePolicy | None = None,
    workers: int | None = None,
    search_path: Sequence[str] = (),
) -> Scorer:
    """Open a reward by name. RewardError when it cannot be found or loaded.

    Only rewards of the user start workers (default: one a CPU core, four at most), and only theirs obey the limits: what is
    built in is bounded by itself.
    """
    located = locate(reward, search_path)
    policy = policy or FailurePolicy()
    if located.built_in:
        return Scorer(located, policy, load_built_in(located), None)
    workers = workers or min(4, os.cpu_count() or 1)
    return Scorer(located, policy, None, RewardPool(located, workers=workers, limits=limits, search_path=search_path))


def score(batch: SampleBatch, texts: Sequence[str], prompts: Mapping[int, Prompt], scorer: Scorer) -> RewardReport:
    """Score the responses of a batch: texts[i] is sample i's response, prompts are by prompt_id.

    ValueError when the texts are not one a sample, or a sample's prompt is not there.
    """
    if len(texts) != batch.num_samples:
        raise ValueError(f"{len(texts)} texts for {batch.num_samples} samples")
    missing = sorted({int(each) for each in batch.prompt_id} - set(prompts))
    if missing:
        raise ValueError(f"no prompt {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    items = []
    for text, prompt_id in zip(texts, map(int, batch.prompt_id), strict=True):
        prompt = prompts[prompt_id]
        items.append(RewardItem(prompt.text, text, prompt.answer, prompt.metadata, prompt_id))
    return scorer.score(items)


def response_texts(batch: SampleBatch, tokenizer: Tokenizer) -> list[str]:
    """The responses as text, special tokens left out."""
    return [tokenizer.decode(batch.response(index).tolist()) for index in range(batch.num_samples)]
