"""SGLang as a `RolloutEngine`: one object a GPU of an engine, the first of which owns the engine's process."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_plan.backends.engine import EngineError, MemoryReport, Part, Request, WeightBucket
from miles_plan.backends.sglang_engine.engine_link import EngineLink
from miles_plan.backends.sglang_engine.engine_process import KERNELS_SWITCH
from miles_plan.backends.sglang_engine.generation import Routed, batch_of, responses, sampling_parameters
from miles_plan.backends.sglang_engine.read_back import Effective, check
from miles_plan.backends.sglang_engine.server_arguments import OWN_KERNELS, RECEIVER, ServerArguments
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import SamplingOptions

NO_WEIGHTS = -1
NCCL = "nccl_broadcast"
# torch_memory_saver's tags; graphs hold activations, which are there whenever the cache is
TAGS: Mapping[str, tuple[str, ...]] = {"weights": ("weights",), "kv_cache": ("kv_cache", "cuda_graph")}


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """What an engine is made with. gpus: its CUDA_VISIBLE_DEVICES, in rank order; log: where its process prints."""

    arguments: ServerArguments
    gpus: tuple[str, ...]
    log: Path
    vocab_size: int
    max_positions: int
    routed: Routed | None = None
    name: str = "sglang"


def launch(arguments: ServerArguments, *, gpus: Sequence[str], log: Path, name: str, needed: Path | None = None) -> EngineLink:
    """Start an engine's process, which touches no GPU before its turn; see `EngineLink`."""
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if arguments.attention_backend == OWN_KERNELS:
        environment[KERNELS_SWITCH] = "1"
    return EngineLink(arguments.as_mapping(), log=log, environment=environment, name=name, needed=needed)


class SglangRolloutEngine:
    """The first rank of an engine: starts its process on all of its GPUs and speaks for it; a `RolloutEngine`.

    EngineError when the package is missing, the engine does not start, or it runs otherwise than it was asked to.
    """

    def __init__(self, options: SglangOptions, link: EngineLink | None = None) -> None:
        """Start the engine; returns when it serves the weights of its model directory, as version 0.

        link: a process that was launched with the same arguments and waits for its turn.
        """
        self.options = options
        began = time.perf_counter()
        self._verdicts = tempfile.TemporaryDirectory(prefix="mplan-sglang-")
        self._link = link or launch(options.arguments, gpus=options.gpus, log=options.log, name=options.name)
        try:
            self.effective: Effective = check(options.arguments.as_mapping(), self._link.start())
        except BaseException:
            self._link.close()
            raise
        self.started_s = time.perf_counter() - began
        self._version = 0
        self._asleep: set[str] = set()
        self._incoming: tuple[int, int] | None = None  # version and how many of its buckets are here
        self._complete = False
        self._group: str | None = None
        self._running = 0
        self._generating_s = 0.0

    @property
    def start_s(self) -> Mapping[str, float]:
        """What its start was made of, in seconds."""
        return self._link.started_s

    @property
    def ranks(self) -> int:
        """Schedulers of the engine, one a GPU."""
        return len(self.options.gpus)

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._link.pid

    def generate(self, requests: Sequence[Request], options: SamplingOptions, *, min_version: int) -> SampleBatch:
        """Responses for all requests, in order."""
        self._check_serving(min_version)
        self._check_requests(requests, options)
        if not requests:
            return batch_of((), responses((), None), version=self._version)
        seeded = self.options.arguments.enable_deterministic_inference
        self._running = len(requests)
        try:
            made, seconds = self._link.call(
                "generate",
                prompts=[list(request.prompt) for request in requests],
                sampling=[sampling_parameters(options, request.sample_id, seeded=seeded) for request in requests],
                routed=self.options.routed,
            )
        finally:
            self._running = 0
        self._generating_s += seconds
        return batch_of(requests, made, version=self._version)

    def update_weights(self, bucket: WeightBucket) -> None:
        """Take one bucket; buckets of a version come in order, from 0."""
        if "weights" in self._asleep:
            raise EngineError(f"{self.options.name}: weights are asleep; wake them before version {bucket.version} is sent")
        expected = 0 if self._incoming is None or self._incoming[0] != bucket.version else self._incoming[1]
        if bucket.index != expected:
            raise EngineError(
                f"{self.options.name}: bucket {bucket.index} of version {bucket.version} came, {expected} was due"
            )
        self._version, self._complete = NO_WEIGHTS, False
        if bucket.transport == NCCL:
            self._receive(bucket)
        else:
            self._take(bucket)
        self._incoming = (bucket.version, bucket.index + 1)
        self._complete = bucket.last

    def commit_weights(self, version: int) -> int:
        """Serve a version whose buckets are all here."""
        if self._incoming is None or self._incoming[0] != version or not self._complete:
            raise EngineError(f"{self.options.name}: buckets of version {version} did not arrive; it serves nothing")
        self._version, self._incoming = version, None
        return version

    def probe(self, probes: Sequence[Mapping[str, Any]]) -> list[str]:
        """Which of these elements of the trainer's weights the engine's parameters do not hold."""
        empty = WeightBucket(transport="none", version=self._version, index=0, handle="", tensors=(), last=True)
        return self._hand_over(empty, probes=[dict(probe) for probe in probes])

    def join(self, address: str, port: int, *, rank_offset: int, world_size: int, name: str) -> None:
        """Join a trainer's process group; the engine's ranks are rank_offset and following. Returns when the group is whole."""
        message = self._link.call("join", address=address, port=port, rank_offset=rank_offset, world_size=world_size, name=name)
        if message:
            raise EngineError(f"{self.options.name}: cannot join the group '{name}': {message}")
        self._group = name

    def sleep(self, parts: Sequence[Part]) -> MemoryReport:
        """Give memory back."""
        going = [part for part in _known(parts) if part not in self._asleep]
        if going:
            self._link.call("sleep", tags=_tags(going))
            self._asleep |= set(going)
        if "weights" in going:
            self._version, self._incoming = NO_WEIGHTS, None
        return self._memory()

    def wake(self, parts: Sequence[Part]) -> MemoryReport:
        """Take memory again; weights come back empty and must be sent."""
        coming = [part for part in _known(parts) if part in self._asleep]
        if coming:
            self._link.call("wake", tags=_tags(coming))
            self._asleep -= set(coming)
        return self._memory()

    def abort(self) -> None:
        """End every request that runs; `generate` raises then. May be called from another thread."""
        self._link.abort()

    def health(self) -> Mapping[str, Any]:
        """Version held (-1: none), requests running, whether the process lives, what sleeps, memory by part.

        generating_s: seconds that SGLang's own `generate` took, over all calls; the rest of ours is the way there and back.
        """
        return {
            "weight_version": self._version,
            "running": self._running,
            "generating_s": self._generating_s,
            "alive": self._link.alive(),
            "asleep": sorted(self._asleep),
            "device_bytes": dict(self._memory().device_bytes),
        }

    def close(self) -> None:
        """End the process; its GPU memory is free when this returns."""
        self._link.close()
        self._verdicts.cleanup()

    def _check_serving(self, min_version: int) -> None:
        if self._asleep:
            raise EngineError(f"{self.options.name}: asleep ({', '.join(sorted(self._asleep))}); wake it before generating")
        if self._version < max(min_version, 0):
            raise EngineError(f"{self.options.name}: holds weights version {self._version}, {min_version} was asked for")

    def _check_requests(self, requests: Sequence[Request], options: SamplingOptions) -> None:
        """SGLang would refuse the whole batch without saying which request it is about."""
        room = self.options.max_positions - options.max_response_tokens
        for request in requests:
            wrong = ""
            if not 0 < len(request.prompt) <= room:
                wrong = f"{len(request.prompt)} prompt tokens, 1 to {room} fit beside the response"
            elif not 0 <= min(request.prompt) <= max(request.prompt) < self.options.vocab_size:
                wrong = f"a token outside the vocabulary of {self.options.vocab_size}"
            if wrong:
                raise EngineError(f"{self.options.name}: sample {request.sample_id}: {wrong}")

    def _receive(self, bucket: WeightBucket) -> None:
        if self._group is None:
            raise EngineError(f"{self.options.name}: has joined no group to receive weights in")
        message = self._link.call(
            "receive",
            names=[tensor.name for tensor in bucket.tensors],
            dtypes=[tensor.dtype for tensor in bucket.tensors],
            shapes=[list(tensor.shape) for tensor in bucket.tensors],
            group=self._group,
            flush=bucket.last,  # keys and values of the old weights must not serve a prefix under the new ones
        )
        if message:
            raise EngineError(f"{self.options.name}: bucket {bucket.index} of version {bucket.version}: {message}")

    def _take(self, bucket: WeightBucket) -> None:
        if wrong := self._hand_over(bucket):
            raise EngineError(f"{self.options.name}: bucket {bucket.index} of version {bucket.version}: {'; '.join(wrong)}")

    def _hand_over(self, bucket: WeightBucket, probes: Sequence[dict[str, Any]] = ()) -> list[str]:
        """Let the schedulers take a bucket; returns what they found wrong."""
        from miles_plan.backends.sglang_engine.receive import description_of, verdicts_of
        from miles_plan.backends.weight_transport.cuda_ipc import Lent, Nothing

        prefix = os.path.join(self._verdicts.name, f"{bucket.version}-{bucket.index}")
        payload = Lent(bucket.handle) if bucket.transport == "cuda_ipc" else Nothing()
        description = description_of(bucket, verdicts=prefix, payload=bucket.transport, probes=probes)
        pickled = pickle.dumps([(description, payload)])
        message = self._link.call("take", payloads=[pickled] * self.ranks, receiver=RECEIVER, flush=bucket.last)
        if message:
            raise EngineError(f"{self.options.name}: bucket {bucket.index} of version {bucket.version}: {message}")
        return verdicts_of(prefix, self.ranks)

    def _memory(self) -> MemoryReport:
        """By part, as SGLang measured them when it started; of one GPU."""
        facts = self.effective
        held = {"weights": facts.weight_bytes, "kv_cache": facts.pool_bytes + facts.graph_bytes}
        return MemoryReport(
            device_bytes={part: 0 if part in self._asleep else size for part, size in held.items()}, host_bytes={}
        )


class SglangFollower:
    """A GPU of an engine whose process another rank owns: it takes the same calls and has nothing to do for them."""

    def __init__(self) -> None:
        """Nothing is held here."""
        self._version = 0

    def generate(self, requests: Sequence[Request], options: SamplingOptions, *, min_version: int) -> SampleBatch | None:
        """Nothing: the first rank has the samples."""
        return None

    def update_weights(self, bucket: WeightBucket) -> None:
        """Nothing: the first rank hands buckets to all schedulers."""

    def commit_weights(self, version: int) -> int:
        """As the first rank does, or its own commit fails."""
        self._version = version
        return version

    def sleep(self, parts: Sequence[Part]) -> MemoryReport:
        """Nothing."""
        return MemoryReport(device_bytes={}, host_bytes={})

    def wake(self, parts: Sequence[Part]) -> MemoryReport:
        """Nothing."""
        return MemoryReport(device_bytes={}, host_bytes={})

    def health(self) -> Mapping[str, Any]:
        """The version last committed."""
        return {"weight_version": self._version, "running": 0}

    def close(self) -> None:
        """Nothing."""


def _known(parts: Sequence[Part]) -> list[Part]:
    for part in parts:
        if part not in TAGS:
            raise ValueError(f"a rollout engine can put {' and '.join(TAGS)} to sleep, not '{part}'")
    return list(dict.fromkeys(parts))


def _tags(parts: Sequence[Part]) -> list[str]:
    return [tag for part in parts for tag in TAGS[part]]
