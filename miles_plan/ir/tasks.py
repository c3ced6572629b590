"""The tasks of one iteration: what runs, with everything a backend needs to run it.

Each kind names what it takes and gives, by type of payload; the verifier holds edges to that. A plan file is all a run
needs, so options that only matter at run time (a clip range, a timeout) stand here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field

from miles_plan.ir.layout import Recompute
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions

Payload = Literal[
    "prompts",
    "samples",
    "rewards",
    "log_probs",
    "values",
    "advantages",
    "importance_weights",
    "routing",
    "weights",
    "draft_weights",
    "order",
]

Transport = Literal["shared_memory", "cuda_ipc", "nccl_broadcast", "p2p", "disk_delta"]
EnginePart = Literal["weights", "gradients", "optimizer", "reference", "kv_cache", "draft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Seconds one run of a task takes: the expected value inside an interval, and where the figure comes from."""

    low_s: float
    mid_s: float
    high_s: float
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work inside one device group.

    loop: the loop it belongs to; every: it runs in iterations i where (i + 1) is a multiple of `every`, and in the last one.
    group is None until placement; estimate and deadline_s until the guard pass; start_s (within an iteration) until scheduling.
    """

    name: str
    loop: str
    group: str | None = None
    every: int = 1
    estimate: TimeEstimate | None = None
    start_s: float | None = None
    deadline_s: float | None = None
    restart: Literal["retry", "rebuild", "rollback", "fatal"] | None = None

    takes: ClassVar[frozenset[Payload]] = frozenset()
    needs: ClassVar[frozenset[Payload]] = frozenset()
    gives: ClassVar[frozenset[Payload]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"host"})

    def problems(self) -> Iterator[str]:
        """What is wrong with this task taken alone."""
        if self.every < 1:
            yield f"every must be at least 1, got {self.every}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts(Task):
    """Draw the next prompts (or demonstrations, for SFT) from a data set; a pure function of seed and cursor."""

    kind: Literal["prompts"] = "prompts"
    source: str
    rows: Literal["prompts", "demonstrations"] = "prompts"
    prompts_per_step: int
    samples_per_prompt: int = 1
    max_prompt_tokens: int = 0  # 0 = no limit
    shuffle: bool = True
    seed: int = 0

    takes: ClassVar[frozenset[Payload]] = frozenset({"order"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"prompts", "samples"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Speculative decoding: a draft proposes `steps` tokens, the policy verifies them in one forward.

    accept_length: expected tokens accepted per verification, the bonus token included.
    """

    method: Literal["mtp", "eagle"]
    steps: int
    topk: int
    draft_tokens: int
    accept_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Task):
    """Sample responses with the current policy.

    keep_prompts: return when so many prompts have all their samples (over-sampling: fewer than were drawn; 0 = all).
    partial: unfinished samples are carried into the next iteration instead of being thrown away.
    """

    kind: Literal["rollout"] = "rollout"
    sampling: SamplingOptions
    samples_per_prompt: int
    keep_prompts: int = 0
    partial: bool = False
    record_routing: bool = False
    prefix_sharing: bool = True
    max_running: int = 0  # requests of one engine at a time
    kv_pool_tokens: int = 0  # of one engine
    page_tokens: int = 16
    static_fraction: float = 0.0  # SGLang's mem_fraction_static; 0 = not applicable
    speculation: Speculation | None = None

    takes: ClassVar[frozenset[Payload]] = frozenset({"prompts", "weights", "draft_weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"prompts", "weights"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"samples", "routing", "log_probs"})
    roles: ClassVar[frozenset[str]] = frozenset({"rollout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward(Task):
    """Score samples with a built-in or user function, each under a deadline, failures scored by policy."""

    kind: Literal["reward"] = "reward"
    reward: str
    timeout_s: float
    on_failure: Literal["zero", "drop", "fail"] = "zero"
    workers: int = 1

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"rewards"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterGroups(Task):
    """Keep prompts whose samples differ in reward; draw more until `keep_prompts` are found or rounds run out (DAPO)."""

    kind: Literal["filter_groups"] = "filter_groups"
    keep_prompts: int
    max_rounds: int

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "rewards", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples", "rewards"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"samples", "rewards"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRouting(Task):
    """Take the experts the rollout chose, check shape, range and coverage, and pack them into the smallest integer type.

    moe_layers: indices of the model's mixture-of-experts layers, in the order of the payload's second axis.
    """

    kind: Literal["record_routing"] = "record_routing"
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int
    dtype: Literal["uint8", "uint16"]
    bytes_per_token: int

    takes: ClassVar[frozenset[Payload]] = frozenset({"routing", "samples", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"routing"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"routing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRouting(Task):
    """Hand recorded experts to every forward and recompute of the trainer; the run stops above `max_mismatch_fraction`."""

    kind: Literal["replay_routing"] = "replay_routing"
    moe_layers: tuple[int, ...]
    max_mismatch_fraction: float

    takes: ClassVar[frozenset[Payload]] = frozenset({"routing", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"routing"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"routing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs(Task):
    """Log-probs of the response tokens under a model, by a forward pass of the trainer."""

    kind: Literal["logprobs"] = "logprobs"
    model: Literal["policy", "reference", "teacher"]
    temperature: float = 1.0
    tokens_per_gpu: int = 0
    replay_routing: bool = False
    compare_with_rollout: bool = False
    alignment: Literal["exact", "replay", "corrected", "off"] | None = None  # None until aligned, or nothing to align
    max_log_prob_diff: float | None = None  # the run stops above it; None = only reported

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "routing", "log_probs", "weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"log_probs"})
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Values(Task):
    """The critic's value of every response token (PPO)."""

    kind: Literal["values"] = "values"
    tokens_per_gpu: int = 0

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"values"})
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage(Task):
    """Turn rewards into one advantage a response token."""

    kind: Literal["advantage"] = "advantage"
    estimator: Literal["group", "leave_one_out", "reinforce_plus_plus", "gae", "distillation"]
    normalize_std: bool = True
    gamma: float = 1.0
    gae_lambda: float = 1.0
    kl_reward_coef: float = 0.0

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "rewards", "log_probs", "values", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"advantages"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Correct(Task):
    """Importance weights that correct for rollout and trainer disagreeing: truncated (TIS) or masked (MIS)."""

    kind: Literal["correct"] = "correct"
    method: Literal["tis", "mis"]
    level: Literal["token", "sequence", "geometric"] = "token"
    clip_low: float = 0.0
    clip_high: float = 2.0

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "log_probs", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples", "log_probs"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"importance_weights"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer(Task):
    """Hold finished samples between asynchronous rollout and training; samples older than `max_staleness` are dropped."""

    kind: Literal["buffer"] = "buffer"
    capacity_samples: int
    max_staleness: int

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "routing", "rewards", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"samples", "routing", "rewards"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep(Task):
    """One or more optimizer steps over a batch. `updates` splits the batch into so many optimizer steps.

    gradients: format they add up and travel in; offload_fraction: share of the optimizer state on the host where any is there;
    release: of the trainer's software, `auto` where the spec names none.
    """

    kind: Literal["train_step"] = "train_step"
    model: Literal["policy", "critic"] = "policy"
    loss: LossOptions
    optimizer: OptimizerOptions
    updates: int = 1
    tokens_per_gpu: int = 0
    recompute: Recompute = "none"
    optimizer_offload: bool = False
    offload_fraction: float = 1.0
    gradients: Literal["fp32", "bf16"] = "fp32"
    release: str = "auto"
    replay_routing: bool = False
    temperature: float = 1.0
    nonfinite: Literal["skip", "rollback", "stop"] = "skip"

    takes: ClassVar[frozenset[Payload]] = frozenset(
        {"samples", "advantages", "log_probs", "importance_weights", "routing", "values", "weights", "order"}
    )
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStep(Task):
    """Train the speculative draft on the rollout's tokens; embedding and head are shared and take no gradient from it."""

    kind: Literal["draft_step"] = "draft_step"
    optimizer: OptimizerOptions

    takes: ClassVar[frozenset[Payload]] = frozenset({"samples", "routing", "weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"samples"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"draft_weights"})
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Task):
    """Turn exported weights into the rollout's format before they travel."""

    kind: Literal["quantize"] = "quantize"
    target: str

    takes: ClassVar[frozenset[Payload]] = frozenset({"weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSync(Task):
    """Move the policy's weights to the rollout engines, in buckets, versioned and checksummed.

    Runs on the rollout group: it is the receivers that must acknowledge the version.
    """

    kind: Literal["weight_sync"] = "weight_sync"
    transport: Transport | None = None
    bucket_bytes: int = 0
    total_bytes: int = 0
    draft: bool = False

    takes: ClassVar[frozenset[Payload]] = frozenset({"weights", "draft_weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    gives: ClassVar[frozenset[Payload]] = frozenset({"weights", "draft_weights"})
    roles: ClassVar[frozenset[str]] = frozenset({"rollout"})

    def problems(self) -> Iterator[str]:
        """A transport that is chosen moves something, in buckets of some size."""
        yield from Task.problems(self)
        if self.transport is not None and self.bucket_bytes < 1:
            yield f"bucket_bytes must be positive, got {self.bucket_bytes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload(Task):
    """Move parts of an engine off its GPUs so that the engine beside it has room."""

    kind: Literal["offload"] = "offload"
    parts: tuple[EnginePart, ...]
    bytes_per_gpu: int = 0

    takes: ClassVar[frozenset[Payload]] = frozenset({"order"})
    gives: ClassVar[frozenset[Payload]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"train", "rollout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Onload(Task):
    """Bring parts of an engine back onto its GPUs."""

    kind: Literal["onload"] = "onload"
    parts: tuple[EnginePart, ...]
    bytes_per_gpu: int = 0

    takes: ClassVar[frozenset[Payload]] = frozenset({"order"})
    gives: ClassVar[frozenset[Payload]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"train", "rollout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Task):
    """Save all state of the run; the manifest is written last."""

    kind: Literal["checkpoint"] = "checkpoint"
    keep: int = 2
    total_bytes: int = 0

    takes: ClassVar[frozenset[Payload]] = frozenset({"weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    gives: ClassVar[frozenset[Payload]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(Task):
    """Sample held-out prompts with the served weights and score them; nothing is learned from it."""

    kind: Literal["evaluate"] = "evaluate"
    source: str
    sampling: SamplingOptions
    samples_per_prompt: int = 1
    reward: str
    timeout_s: float

    takes: ClassVar[frozenset[Payload]] = frozenset({"weights", "order"})
    needs: ClassVar[frozenset[Payload]] = frozenset({"weights"})
    gives: ClassVar[frozenset[Payload]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"rollout"})


AnyTask = Annotated[
    Union[  # noqa: UP007 - pydantic reads the discriminator from an Annotated Union
        Prompts,
        Rollout,
        Reward,
        FilterGroups,
        RecordRouting,
        ReplayRouting,
        Logprobs,
        Values,
        Advantage,
        Correct,
        Buffer,
        TrainStep,
        DraftStep,
        Quantize,
        WeightSync,
        Offload,
        Onload,
        Checkpoint,
        Evaluate,
    ],
    Field(discriminator="kind"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What flows from one task to another.

    distance: 0 within an iteration; d > 0 means the value that `src` made d iterations earlier (before that, the initial
    state: for weights, version 0). An edge between loops carries the last iteration's value into every iteration.
    """

    src: str
    dst: str
    carries: Payload
    distance: int = field(default=0)
