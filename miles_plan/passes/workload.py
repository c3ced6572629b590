"""How many tokens one step handles: prompts, responses and their distribution, stated by the spec or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from miles_plan.cost.lengths import LengthDistribution, fit_lengths, load_lengths
from miles_plan.passes.base import PassContext
from miles_plan.spec.data import ArithmeticPrompts

# Without a stated mean, responses are taken to fill this share of the limit; the rollout's interval is widened for it.
ASSUMED_MEAN_FRACTION = 0.4
ASSUMED_PROMPT_TOKENS = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWorkload:
    """Sequences of one step. Prompts are taken as equally long; `lengths` is of responses alone.

    drawn_samples counts over-sampled ones that are generated and thrown away; assumed says that the spec gave no mean.
    """

    prompts: int
    samples_per_prompt: int
    drawn_samples: int
    prompt_tokens: float
    lengths: LengthDistribution
    max_response_tokens: int
    assumed: bool

    @property
    def samples(self) -> int:
        """Sequences that are trained on."""
        return self.prompts * self.samples_per_prompt

    @property
    def longest_tokens(self) -> int:
        """Longest sequence, prompt and response."""
        return int(self.prompt_tokens) + 1 + self.max_response_tokens

    @property
    def total_tokens(self) -> float:
        """Expected tokens of all sequences that are trained on."""
        return self.samples * (self.prompt_tokens + self.lengths.mean_tokens)

    @property
    def response_tokens(self) -> float:
        """Expected response tokens that are generated."""
        return self.drawn_samples * self.lengths.mean_tokens

    @property
    def sum_squares(self) -> float:
        """Expected sum of squared sequence lengths, which attention costs."""
        prompt = self.prompt_tokens
        return self.samples * (prompt**2 + 2.0 * prompt * self.lengths.mean_tokens + self.lengths.mean_square)


def step_workload(ctx: PassContext) -> StepWorkload:
    """The workload of one step of the main loop."""
    rollout = ctx.job.rollout
    samples = 1 if ctx.job.algorithm.kind == "sft" else rollout.samples_per_prompt
    lengths, assumed = response_lengths(ctx)
    return StepWorkload(
        prompts=rollout.prompts_per_step,
        samples_per_prompt=samples,
        drawn_samples=round(rollout.prompts_per_step * rollout.over_sampling) * samples,
        prompt_tokens=prompt_tokens(ctx),
        lengths=lengths,
        max_response_tokens=rollout.response_tokens.max,
        assumed=assumed,
    )


def response_lengths(ctx: PassContext) -> tuple[LengthDistribution, bool]:
    """The distribution of response lengths, and whether its mean is an assumption."""
    asked = ctx.job.rollout.response_tokens
    if asked.histogram is not None:
        return load_lengths(ctx.file(asked.histogram)).cut(float(asked.max)), False
    assumed = asked.mean == "auto"
    mean = max(1.0, ASSUMED_MEAN_FRACTION * asked.max) if asked.mean == "auto" else asked.mean
    p99 = None if asked.p99 == "auto" else asked.p99
    return _fitted(float(asked.max), float(min(mean, asked.max)), p99), assumed


@lru_cache(maxsize=64)
def _fitted(max_tokens: float, mean_tokens: float, p99_tokens: float | None) -> LengthDistribution:
    return fit_lengths(max_tokens, mean_tokens, p99_tokens)


def prompt_tokens(ctx: PassContext) -> float:
    """Mean prompt length: the spec's, the generator's, or an assumption."""
    asked = ctx.job.rollout.prompt_tokens
    if asked.mean != "auto":
        return float(asked.mean)
    prompts = ctx.job.data.prompts
    if isinstance(prompts, ArithmeticPrompts):
        return float(2 * len(str(prompts.max_operand)) + 2)  # two operands, a sign and an equals sign, one token a character
    if asked.max != "auto":
        return asked.max / 2
    return ASSUMED_PROMPT_TOKENS
