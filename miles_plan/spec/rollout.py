"""`rollout:` how samples are generated: batch, lengths, sampling, engine, layout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles_plan.spec.section import Section
from miles_plan.spec.types import AutoOr, Count, CountOrZero, FilePath, Fraction, OpenFraction, Size, WordOr

Tokens = Annotated[float, Field(gt=0, le=100_000_000)]


class ResponseTokensSpec(Section):
    """Lengths of responses in tokens: the limit, and what is known of the distribution."""

    max: Count
    """Generation stops here."""
    mean: AutoOr[Tokens] = "auto"
    """Expected mean; `auto` assumes a distribution below `max` and widens the estimate's interval."""
    p99: AutoOr[Tokens] = "auto"
    """Expected 99th percentile; `auto` is assumed likewise."""
    histogram: FilePath | None = None
    """A JSON or JSONL file of measured lengths, instead of `mean` and `p99`."""


class PromptTokensSpec(Section):
    """Lengths of prompts in tokens."""

    mean: AutoOr[Tokens] = "auto"
    """Expected mean; `auto` is measured from the data if it can be read, else assumed."""
    max: AutoOr[Count] = "auto"
    """Longest prompt; `auto` likewise."""


class RolloutLayoutSpec(Section):
    """Parallel sizes of the rollout engines, as SGLang names them; `miles_plan.ir.layout.RolloutLayout` is the planned form."""

    engines: AutoOr[Size] = "auto"
    """Independent engines; `auto` uses all rollout GPUs."""
    tp: Size = 1
    """GPUs of one engine."""
    pp: Size = 1
    """Pipeline stages inside one engine."""
    ep: Size = 1
    """Expert parallel ranks inside the engine's tp ranks."""
    dp_attention: Size = 1
    """Data-parallel attention ranks inside the engine's tp ranks; 1 is off."""


class DynamicSamplingSpec(Section):
    """Sample again where all rewards of a prompt are equal (DAPO, arXiv 2503.14476)."""

    enabled: bool = False
    """Whether to."""
    max_rounds: Annotated[int, Field(ge=1, le=1_000)] = 10
    """Rounds after which the step goes on with what it has."""


class SpeculativeSpec(Section):
    """Speculative decoding: a draft proposes tokens that the policy accepts or rejects, with unchanged distribution."""

    method: Literal["mtp", "eagle"]
    """mtp: the model's own multi-token-prediction layer; eagle: a draft model (arXiv 2401.15077)."""
    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Draft steps per verification."""
    topk: Annotated[int, Field(ge=1, le=64)] = 1
    """Branches kept at each draft step."""
    draft_tokens: AutoOr[Annotated[int, Field(ge=1, le=1_024)]] = "auto"
    """Tokens verified at once; `auto` is steps + 1 for one branch."""
    train: bool = False
    """Train the draft online on the policy's samples."""


class RolloutSpec(Section):
    """Generation of samples."""

    prompts_per_step: Count
    """Prompts of one step (for sft: examples of one step)."""
    samples_per_prompt: Count = 1
    """Samples of one prompt; the group of group-relative algorithms."""
    response_tokens: ResponseTokensSpec
    """Lengths of responses."""
    prompt_tokens: PromptTokensSpec = Field(default_factory=PromptTokensSpec)
    """Lengths of prompts."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Logits are divided by it, in the rollout and in the trainer's log-probs."""
    top_p: Fraction = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1 is off."""
    top_k: CountOrZero = 0
    """Sample among the k likeliest tokens; 0 is the whole vocabulary."""
    engine: Literal["sglang", "torch"] = "sglang"
    """sglang: SGLang servers; torch: the embedded engine, on CPU or one GPU a rank."""
    layout: AutoOr[RolloutLayoutSpec] = "auto"
    """Parallel sizes; `auto` searches."""
    memory_fraction: AutoOr[OpenFraction] = "auto"
    """Share of GPU memory for weights and KV cache of the engine (SGLang's mem_fraction_static)."""
    max_running: AutoOr[Count] = "auto"
    """Samples that one engine decodes at once; `auto` follows from the KV cache."""
    page_tokens: AutoOr[Annotated[int, Field(ge=1, le=4_096)]] = "auto"
    """Tokens of a KV cache page; `auto` is 16, or 64 where SGLang runs our kernels (alignment: exact)."""
    prefix_sharing: bool = True
    """Share the prompt's KV pages among its samples."""
    over_sampling: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Prompts started per prompt needed; the slowest are dropped."""
    dynamic_sampling: DynamicSamplingSpec = Field(default_factory=DynamicSamplingSpec)
    """Sampling again of prompts that teach nothing."""
    partial: bool = False
    """Carry unfinished samples over to the next step instead of dropping them."""
    speculative: WordOr[Literal["off"], SpeculativeSpec] = "off"
    """Speculative decoding."""
