"""`data:` prompts and rewards; `warm_start:` supervised steps before RL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.section import Section
from miles_plan.spec.train import OptimizerFields
from miles_plan.spec.types import AutoOr, Count, FilePath, RewardName, Seconds, Seed, Size, WordOr


class ArithmeticPrompts(Section):
    """Prompts made by the built-in generator of arithmetic tasks, the same for the same seed."""

    generator: Literal["arithmetic"]
    """Which generator."""
    seed: Seed = 0
    """Seed of the generator, apart from the job's."""
    max_operand: Annotated[int, Field(ge=1, le=999)] = 19
    """Largest number in a problem."""
    held_out: Annotated[int, Field(ge=1, le=100_000)] = 40
    """Problems kept for evaluation; neither demonstrations nor prompts contain them."""
    demonstrations: Annotated[int, Field(ge=1, le=10_000_000)] = 8192
    """Lines of the warm start's data."""
    slips: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Share of the warm start's demonstrations whose answer is wrong, as a careless pupil's."""


Prompts = WordOr[FilePath, ArithmeticPrompts]


class DataSpec(Section):
    """What the policy is asked and how its answers are scored."""

    prompts: Prompts
    """A JSONL file, one prompt a line, or a generator."""
    reward: RewardName | None = None
    """`math`, `exact_match`, or `package.module:function`; sft and distillation need none."""
    reward_timeout_s: Seconds = 10.0
    """Seconds after which the reward of one sample is killed."""
    reward_failure: Literal["zero", "drop", "fail"] = "zero"
    """What a sample gets whose reward raised, hung or was no finite number: score 0, be dropped, or stop the run."""
    reward_workers: AutoOr[Size] = "auto"
    """Processes that compute rewards; `auto` follows the CPU count and the batch."""
    shuffle: bool = True
    """Shuffle the prompts each epoch, by the job's seed."""
    max_prompt_tokens: AutoOr[Count] = "auto"
    """Longer prompts are refused; `auto` is `rollout.prompt_tokens.max`."""


class WarmStartSpec(OptimizerFields):
    """Supervised fine-tuning before the first rollout, with its own optimizer settings."""

    data: Prompts
    """A JSONL file of prompts with answers, or a generator."""
    steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Examples per step."""
