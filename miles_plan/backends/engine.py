"""What an engine must do, whoever wrote it: two protocols, each with one contract test suite that every engine passes.

An engine object is one rank's part of an engine: the executor makes one per rank inside one actor and calls the same method
on all ranks with the same arguments. Batches arrive whole; a data-parallel rank takes its own share (`share_of_rank`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions

WhichModel = Literal["policy", "reference", "teacher"]
Part = Literal["weights", "gradients", "optimizer", "reference", "kv_cache", "draft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to generate: the prompt's tokens and the ids under which the result is filed."""

    sample_id: int
    prompt_id: int
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLogProbs:
    """Log-probs of one rank's share: `sample_index` int64 into the batch, `log_probs` float32 flat over their responses.

    `routing_mismatches` counts (token, layer) pairs where the model's own router would have chosen other experts than those
    replayed; `routing_compared` the pairs looked at. Ranks that own no output return empty arrays.
    """

    sample_index: Array
    log_probs: Array
    entropy: Array
    routing_mismatches: int = 0
    routing_compared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTensor:
    """One full tensor inside a bucket: its Hugging Face name, shape, dtype and place."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's short name: "float32", "bfloat16"
    offset_bytes: int
    size_bytes: int
    checksum: str  # SHA-256 of the bytes, first 16 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """A handle to weights on their way to the rollout engines; never the bytes themselves.

    `handle` is what the transport needs: a shared-memory segment's name, a CUDA IPC handle, a file's path.
    """

    transport: str
    version: int
    index: int
    handle: str
    tensors: tuple[WeightTensor, ...]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketLayout:
    """What one bucket of a stream of weights holds: full tensors under their Hugging Face names, at offsets inside the bucket.

    Checksums are empty: a layout is known before there are bytes.
    """

    index: int
    tensors: tuple[WeightTensor, ...]
    last: bool

    @property
    def size_bytes(self) -> int:
        """Bytes from the bucket's start to the end of its last tensor."""
        return max((tensor.offset_bytes + tensor.size_bytes for tensor in self.tensors), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBucket:
    """One bucket in a device's memory. data: torch.uint8 [size_bytes], valid until its stream is asked for the next bucket."""

    layout: BucketLayout
    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes an engine holds, by part, on its device and parked on the host."""

    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]


class EngineError(RuntimeError):
    """An engine could not do what was asked: it names the engine, the request and what to change."""


@runtime_checkable
class TrainEngine(Protocol):
    """One rank of a trainer. Every method is called on all ranks with the same arguments, in the same order."""

    def log_probs(self, batch: SampleBatch, *, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        """Log-probs of every response token under `model` at the sampling temperature (0 counts as 1).

        With `replay_routing`, experts come from `batch.routing` and the router's own choice is only compared with them.
        """
        ...

    def train_step(
        self,
        batch: SampleBatch,
        *,
        loss: LossOptions,
        optimizer: OptimizerOptions,
        replay_routing: bool,
        temperature: float = 1.0,
    ) -> Mapping[str, float]:
        """One optimizer step over `batch` (gradient accumulation inside); metrics reduced over all ranks.

        `temperature` is that at which the batch was sampled. The policy-gradient loss reads the columns
        `advantage`, `old_log_probs`, and where asked `reference_log_probs` and `importance_weight`.
        """
        ...

    def draft_step(self, batch: SampleBatch, *, optimizer: OptimizerOptions) -> Mapping[str, float]:
        """One optimizer step of the speculative draft over `batch`; the policy is only read. EngineError without a draft.

        Metrics reduced over all ranks: draft_loss (mean negative log-prob, at temperature 1, of the response tokens that a
        rollout drafts: all but the first of each response), draft_accuracy (share of them that are the draft's likeliest
        token), draft_tokens, draft_grad_norm, draft_skipped_steps. A batch without such a token skips the step.
        """
        ...

    def snapshot_reference(self) -> None:
        """From now on the reference model is the policy as it is."""
        ...

    def export_weights(self, version: int, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Publish the weights, a draft's too, as full tensors; a rank yields the buckets it owns, in one global order."""
        ...

    def release_weights(self, version: int) -> None:
        """Free what `export_weights` of that version left for receivers."""
        ...

    def offload(self, parts: Sequence[Part]) -> MemoryReport:
        """Move parts off the device; their device memory is free when this returns."""
        ...

    def onload(self, parts: Sequence[Part]) -> MemoryReport:
        """Bring parts back; a no-op for what is resident."""
        ...

    def save(self, directory: Path) -> Sequence[str]:
        """Write this rank's model, optimizer and generator state below `directory`; return the file names written."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit. EngineError names the file that does not fit."""
        ...

    def export_checkpoint(self, directory: Path) -> Sequence[str]:
        """Write the policy as a Hugging Face checkpoint; collective. Returns the file names on the first rank."""
        ...

    def weights_sha256(self) -> str:
        """SHA-256 over the policy's full tensors by name, the same for every layout; collective."""
        ...

    def memory(self) -> MemoryReport:
        """What is held now."""
        ...

    def close(self) -> None:
        """Leave process groups and free everything."""
        ...


@runtime_checkable
class DeviceWeightSource(Protocol):
    """A trainer whose weights can be taken from its device's memory, bucket by bucket, without a copy on the host."""

    def weight_layout(self, *, bucket_bytes: int) -> tuple[BucketLayout, ...]:
        """All buckets, in the order in which they are streamed; a pure function, the same on every rank."""
        ...

    def stream_weights(self, version: int, *, bucket_bytes: int) -> Iterator[DeviceBucket]:
        """The buckets of `weight_layout`, whole on every rank; collective, so every rank goes through all of them."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """One rank of a rollout engine. Ranks of one engine take the same calls and stay in step."""

    def generate(self, requests: Sequence[Request], options: SamplingOptions, *, min_version: int) -> SampleBatch:
        """Responses for all requests, in order. EngineError when the weights held are older than `min_version`."""
        ...

    def update_weights(self, bucket: WeightBucket) -> None:
        """Take one bucket: check each tensor's checksum, then place this rank's shard."""
        ...

    def commit_weights(self, version: int) -> int:
        """All buckets of `version` are in: serve it from now on; returns the version held. EngineError if any is missing."""
        ...

    def sleep(self, parts: Sequence[Part]) -> MemoryReport:
        """Give memory back; a sleeping engine refuses `generate`."""
        ...

    def wake(self, parts: Sequence[Part]) -> MemoryReport:
        """Take memory again. Weights dropped in sleep must be updated before the next `generate`."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Version held, requests running, memory; with a draft, counts since the start: `verifications` of its proposals,
        `verified_tokens` they gave, `guesses` put to the test and `right_guesses`."""
        ...

    def close(self) -> None:
        """Leave process groups and free everything."""
        ...


def share_of_rank(lengths: Array, *, rank: int, ranks: int) -> Array:
    """Sample indices of one data-parallel rank, int64, balanced by tokens.

    Longest first onto the least loaded rank (ties: lowest rank), then each share in batch order; a pure function of the
    lengths, so every rank and the executor agree without talking.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    load = np.zeros(ranks, dtype=np.int64)
    owner = np.zeros(len(lengths), dtype=np.int64)
    for index in order:
        target = int(np.argmin(load))
        owner[index] = target
        load[target] += int(lengths[index])
    return np.flatnonzero(owner == rank)
