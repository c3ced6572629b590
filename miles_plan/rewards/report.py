"""What scoring a batch says: a score a sample, and for each failure which sample, why, and by which reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from miles_plan.data.batch import Array
from miles_plan.rewards.outcome import Outcome, Reason

OnFailure = Literal["zero", "fallback", "drop", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """What a sample gets whose reward failed.

    `zero`: the score 0; `fallback`: the score stated in `fallback`; `drop`: none, the sample is to be left out; `fail`: none,
    the run is to stop. ValueError when `fallback` is stated without being the policy, or is no finite number.
    """

    on_failure: OnFailure = "zero"
    fallback: float | None = None

    def __post_init__(self) -> None:
        if (self.on_failure == "fallback") != (self.fallback is not None):
            raise ValueError("a fallback score is stated exactly when the policy is 'fallback'")
        if self.fallback is not None and not math.isfinite(self.fallback):
            raise ValueError(f"the fallback score {self.fallback} is not finite")

    @property
    def score(self) -> float:
        """The score of a failed sample, NaN for none."""
        if self.on_failure == "zero":
            return 0.0
        return math.nan if self.fallback is None else self.fallback


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A sample without a score of its own. index: in the batch; detail: the traceback's last line, or what happened."""

    index: int
    reason: Reason
    reward: str
    detail: str
    output: str = ""

    def __str__(self) -> str:
        """One line for people."""
        return f"sample {self.index}: {self.reward} {_WORDS[self.reason]}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """Scores of a batch: float32 [N], NaN where the policy drops the sample or stops the run; failures in batch order.

    parts: figures that a reward returned beside its score, float32 [N], NaN for samples that have none.
    """

    reward: str
    scores: Array
    policy: FailurePolicy
    parts: Mapping[str, Array] = field(default_factory=dict)
    failures: tuple[RewardFailure, ...] = ()
    wall_s: float = 0.0

    @property
    def kept(self) -> Array:
        """bool [N], False for samples to be left out."""
        return ~np.isnan(self.scores)

    @property
    def must_stop(self) -> bool:
        """Whether the policy is to stop the run and there is a failure."""
        return self.policy.on_failure == "fail" and bool(self.failures)

    @property
    def counts(self) -> dict[Reason, int]:
        """Failures by reason."""
        return dict(Counter(failure.reason for failure in self.failures))


def report_of(reward: str, outcomes: Sequence[Outcome], policy: FailurePolicy, wall_s: float) -> RewardReport:
    """Apply the policy to what scoring came to."""
    names = sorted({name for outcome in outcomes for name in outcome.parts})
    parts = {name: np.array([outcome.parts.get(name, math.nan) for outcome in outcomes], dtype=np.float32) for name in names}
    scores = [policy.score if outcome.score is None or outcome.reason else outcome.score for outcome in outcomes]
    failures = [
        RewardFailure(index=index, reason=outcome.reason, reward=reward, detail=outcome.detail, output=outcome.output)
        for index, outcome in enumerate(outcomes)
        if outcome.reason is not None
    ]
    return RewardReport(
        reward=reward,
        scores=np.array(scores, dtype=np.float32),
        policy=policy,
        parts=parts,
        failures=tuple(failures),
        wall_s=wall_s,
    )


_WORDS: Mapping[Reason, str] = {
    "raised": "raised",
    "deadline": "took too long",
    "died": "died",
    "not_finite": "gave no finite number",
    "wrong_type": "gave no number",
    "wrong_count": "gave the wrong count",
    "too_much_output": "printed too much",
    "left_processes": "left processes behind",
}
