"""The embedded rollout engine: continuous batching over a paged KV cache, with the trainer's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, MemoryReport, Part, Request, WeightBucket
from miles_plan.backends.torch_engine.decoder import Decoder, StageOutput
from miles_plan.backends.torch_engine.draft_decoder import DraftDecoder, accepted
from miles_plan.backends.torch_engine.feeds import Feed, first_rows, next_tokens, paged_batch
from miles_plan.backends.torch_engine.kv_cache import KvPool, OutOfPagesError, PageAllocator
from miles_plan.backends.torch_engine.mesh import check_rollout_layout, open_mesh
from miles_plan.backends.torch_engine.options import RolloutEngineOptions
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.scheduler import FedSequence, Prompt, Sample, Scheduler, Step
from miles_plan.backends.torch_engine.weights import Shard, load_weights, parameters, pieces_by_name, place
from miles_plan.backends.training.decoder_config import read_config
from miles_plan.backends.training.storage import free_storage, resident_bytes, restore_storage
from miles_plan.backends.weight_transport.shared_memory import read_bucket
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import SamplingOptions
from miles_plan.kernels.sample import sample as draw

NO_WEIGHTS = -1  # the version held while there are none to serve
_PARTS = ("weights", "kv_cache")


@dataclass(slots=True)
class _Record:
    """What a generation leaves of one sample besides its tokens."""

    log_probs: list[float] = field(default_factory=list)
    routing: list[Array] = field(default_factory=list)
    num_routed: int = 0
    stopped: bool = False


@dataclass(slots=True)
class _PromptResult:
    """What the samples of a prompt start from: its routing, and this rank's logits after its last token."""

    logits: Tensor | None = None
    routing: list[Array] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Generation:
    """One `generate` call under way."""

    options: SamplingOptions
    scheduler: Scheduler
    sample_ids: Array
    records: list[_Record]


class TorchRolloutEngine:
    """One rank of an embedded rollout engine; a `RolloutEngine`.

    Every rank of the engine is made with the same options and rendezvous and takes the same calls; they stay in step because
    the schedule is a pure function of the requests and of the tokens drawn, which are the same bits on all ranks. Raises
    ValueError for options or a model it cannot serve.
    """

    def __init__(
        self, options: RolloutEngineOptions, *, rank: int = 0, rendezvous: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.options = options
        self.config = read_config(options.model_directory)
        check_rollout_layout(options.layout, self.config)
        if options.return_routing and not self.config.moe_layers:
            raise ValueError("return_routing asks for the experts of every token, but the model has none")
        if options.max_context_tokens > self.config.max_positions:
            raise ValueError(
                f"max_context_tokens={options.max_context_tokens} is beyond the model's {self.config.max_positions} positions"
            )
        tp = options.layout.tp
        self._mesh = open_mesh(TrainLayout(tp=tp), rank, rendezvous=rendezvous, host=host)
        self._shard = Shard(tp_rank=rank, tp=tp, layers=range(self.config.num_layers))
        self._decoder = Decoder(self.config, self._shard, self._mesh, device=options.device)
        dtype = getattr(torch, options.dtype)
        self._weights = load_weights(options.model_directory, self.config, self._shard, dtype=dtype, device=options.device)
        self._owned = pieces_by_name(parameters(self.config, self._shard))
        self._prepared = PreparedWeights()
        num_pages = options.kv_pool_tokens // options.page_tokens
        self._pages = PageAllocator(num_pages)
        self._pool = KvPool(
            num_layers=self.config.num_layers,
            num_pages=num_pages,
            kv_heads=self.config.num_kv_heads // tp,
            page_tokens=options.page_tokens,
            head_dim=self.config.head_dim,
            device=options.device,
        )
        self._draft: DraftDecoder | None = None
        if options.draft_steps:
            self._draft = DraftDecoder(options, self._decoder, self._weights, self._prepared, num_pages=num_pages)
        self._version = 0
        self._asleep: set[str] = set()
        self._incoming_version: int | None = None
        self._received: set[str] = set()
        self._num_running = 0
        self.num_retracted = 0
        self.num_verifications = 0
        self.num_verified_tokens = 0
        self.num_guesses = 0
        self.num_right_guesses = 0

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.options.max_context_tokens or self.config.max_positions

    def generate(self, requests: Sequence[Request], options: SamplingOptions, *, min_version: int) -> SampleBatch:
        """Responses for all requests, in request order, whatever the schedule. Collective over tp.

        EngineError while asleep, while weights are missing or half received, when their version is below `min_version`, when
        a request cannot fit, or when the model gives log-probs that are not finite.
        """
        self._check_ready(requests, options, min_version)
        scheduler = Scheduler(
            self._pages,
            page_tokens=self.options.page_tokens,
            max_running=self.options.max_running,
            prefill_tokens=self.options.prefill_chunk_tokens,
            prefix_sharing=self.options.prefix_sharing,
            draft_tokens=self.options.draft_steps,
        )
        generation = _Generation(
            options=options,
            scheduler=scheduler,
            sample_ids=np.array([request.sample_id for request in requests], dtype=np.int64),
            records=[_Record() for _ in requests],
        )
        try:
            samples = scheduler.add([request.prompt for request in requests], options.max_response_tokens)
            while scheduler.unfinished:
                self._step(generation)
        except OutOfPagesError as error:
            raise EngineError(f"rollout engine: {error}; raise kv_pool_tokens") from error
        except Exception:
            self._reset_pools()  # NaN from broken weights must not stay in pages that others get
            raise
        finally:
            self.num_retracted += scheduler.num_retracted
            scheduler.close()
            self._num_running = 0
        return self._batch(requests, samples, generation)

    def update_weights(self, bucket: WeightBucket) -> None:
        """Take one bucket: check each tensor's checksum, then place this rank's slices. EngineError for bytes that changed."""
        if "weights" in self._asleep:
            raise EngineError("rollout engine: weights are asleep; wake them before update_weights")
        if self._incoming_version != bucket.version:
            self._incoming_version, self._received = bucket.version, set()
        self._forget_prepared()
        for name, tensor in read_bucket(bucket):
            if self._draft is not None and name in self._draft.names:
                self._draft.take(name, tensor)
            else:
                place(self._weights, self._owned, name, tensor)
            self._received.add(name)

    def commit_weights(self, version: int) -> int:
        """Serve `version` from now on. EngineError names what is missing of it."""
        received = self._received if self._incoming_version == version else set()
        needed = set(self._owned) | (self._draft.names if self._draft is not None else set())
        if missing := sorted(needed - received):
            raise EngineError(
                f"rollout engine: {len(missing)} of {len(needed)} tensors of version {version} did not arrive, "
                f"such as '{missing[0]}'"
            )
        self._incoming_version, self._received = None, set()
        self._forget_prepared()
        self._version = version
        return version

    def sleep(self, parts: Sequence[Part]) -> MemoryReport:
        """Free the memory of "weights" (dropped, not parked) and "kv_cache". ValueError for another part."""
        _check_parts(parts)
        if "weights" in parts:
            self._version = NO_WEIGHTS
            self._forget_prepared()
            free_storage(self._weight_tensors())
        if "kv_cache" in parts:
            free_storage(self._pool_tensors())
        self._asleep.update(parts)
        return self._memory()

    def wake(self, parts: Sequence[Part]) -> MemoryReport:
        """Take the memory again; dropped weights must be updated and committed before the next `generate`."""
        _check_parts(parts)
        if "weights" in parts:
            restore_storage(self._weight_tensors())
        if "kv_cache" in parts and "kv_cache" in self._asleep:
            restore_storage(self._pool_tensors())
            self._reset_pools()
        self._asleep.difference_update(parts)
        return self._memory()

    def health(self) -> Mapping[str, Any]:
        """Version held, what sleeps, samples running, retractions so far, free pages, bytes by part; with a draft, how often
        its proposals were verified so far and the tokens that this gave, each verification's own included; and how many of its
        guesses were put to the test (none after a wrong one, none beyond a sample's end), and how many of them were right."""
        return {
            "weight_version": self._version,
            "asleep": sorted(self._asleep),
            "running": self._num_running,
            "retracted": self.num_retracted,
            "free_pages": self._pages.num_free,
            "pages": self._pages.num_pages,
            "verifications": self.num_verifications,
            "verified_tokens": self.num_verified_tokens,
            "guesses": self.num_guesses,
            "right_guesses": self.num_right_guesses,
            "device_bytes": dict(self._memory().device_bytes),
        }

    def close(self) -> None:
        """Leave the process groups and free everything."""
        self._forget_prepared()
        free_storage([*self._weight_tensors(), *self._pool_tensors()])
        self._asleep.update(_PARTS)
        self._mesh.close()

    def _memory(self) -> MemoryReport:
        prepared = self._prepared.size_bytes + (self._draft.prepared.size_bytes if self._draft is not None else 0)
        weights, cache = resident_bytes(self._weight_tensors()) + prepared, resident_bytes(self._pool_tensors())
        return MemoryReport(device_bytes={"weights": weights, "kv_cache": cache}, host_bytes={})

    def _pools(self) -> list[KvPool]:
        return [self._pool, *([self._draft.pool] if self._draft is not None else [])]

    def _pool_tensors(self) -> list[Tensor]:
        return [tensor for pool in self._pools() for tensor in pool.tensors]

    def _reset_pools(self) -> None:
        for pool in self._pools():
            pool.reset()

    def _weight_tensors(self) -> list[Tensor]:
        return [*self._weights.values(), *(self._draft.weights.values() if self._draft is not None else ())]

    def _forget_prepared(self) -> None:
        self._prepared.clear()
        if self._draft is not None:
            self._draft.prepared.clear()

    def _check_ready(self, requests: Sequence[Request], options: SamplingOptions, min_version: int) -> None:
        if self._asleep:
            raise EngineError(f"rollout engine: {' and '.join(sorted(self._asleep))} asleep; wake before generate")
        if self._incoming_version is not None:
            raise EngineError(f"rollout engine: weights of version {self._incoming_version} are half received; commit them")
        if self._version < min_version or self._version == NO_WEIGHTS:
            held = "none" if self._version == NO_WEIGHTS else f"version {self._version}"
            raise EngineError(f"rollout engine: weights of version {min_version} or newer are needed, {held} is held")
        if options.max_response_tokens < 1:
            raise EngineError(f"rollout engine: max_response_tokens must be at least 1, got {options.max_response_tokens}")
        for request in requests:
            self._check_request(request, options.max_response_tokens)

    def _check_request(self, request: Request, max_response: int) -> None:
        if not request.prompt:
            raise EngineError(f"rollout engine: sample {request.sample_id} has an empty prompt")
        if len(request.prompt) + max_response > self.max_context_tokens:
            raise EngineError(
                f"rollout engine: sample {request.sample_id} has a prompt of {len(request.prompt)} tokens, which with "
                f"max_response_tokens={max_response} is beyond the context of {self.max_context_tokens}"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.config.vocab_size:
            raise EngineError(
                f"rollout engine: sample {request.sample_id} has a token outside the vocabulary of {self.config.vocab_size}"
            )

    def _step(self, generation: _Generation) -> None:
        scheduler = generation.scheduler
        step = scheduler.next_step()
        self._num_running = scheduler.num_running
        for pool in self._pools():
            pool.copy_pages(step.copies)
        drawing: list[Sample] = list(step.fresh)
        logits: list[Tensor] = [self._start_fresh(generation, sample)[None] for sample in step.fresh]
        if step.prefill:
            for sequence, row in self._prefill(generation, step.prefill):
                if isinstance(sequence, Sample):
                    drawing.append(sequence)
                    logits.append(row[None])
        proposals: list[Sequence[int]] = [()] * len(drawing)
        if not step.decode:
            if drawing:
                self._draw(generation, drawing, proposals, torch.cat(logits))
            return
        guesses = self._propose(generation, step)
        feeds = [
            Feed(sample, sample.num_cached, (sample.tokens[-1], *guess))
            for sample, guess in zip(step.decode, guesses, strict=True)
        ]
        output = self._forward(feeds)
        logits.append(self._decoder.logits(self._weights, self._prepared, output.hidden))
        kept = self._draw(generation, [*drawing, *step.decode], [*proposals, *guesses], torch.cat(logits))
        self._keep(generation, feeds, kept[len(drawing) :], output)

    def _propose(self, generation: _Generation, step: Step) -> list[list[int]]:
        """What the draft says comes after each decoding sample's last token; nothing without a draft.

        It draws with the number that the policy will draw with at that position, so the closer the two distributions, the
        likelier the same token comes out: the one rule of acceptance.
        """
        if self._draft is None:
            return [[] for _ in step.decode]
        return self._draft.propose(
            step.decode,
            step.drafts,
            lambda samples, positions, logits: self._choose(generation, samples, positions, logits).tolist(),
        )

    def _start_fresh(self, generation: _Generation, sample: Sample) -> Tensor:
        """The logits after the prompt; the sample's routing record begins with its prompt's."""
        assert sample.prompt is not None, "a fresh sample has just forked"
        result: _PromptResult = sample.prompt.result
        record = generation.records[sample.index]
        record.routing, record.num_routed = list(result.routing), sample.num_prompt
        assert result.logits is not None, "samples fork from prompts that are fed"
        return result.logits

    def _prefill(self, generation: _Generation, prefill: Sequence[tuple[FedSequence, int]]) -> list[tuple[FedSequence, Tensor]]:
        """Feed chunks; the logits after each sequence that has nothing left to feed, [own vocabulary]."""
        feeds = [next_tokens(sequence, count) for sequence, count in prefill]
        output = self._forward(feeds)
        self._keep(generation, feeds, [count for _, count in prefill], output)
        ends = first_rows(feeds) + [count - 1 for _, count in prefill]
        done = [(sequence, end) for (sequence, _), end in zip(prefill, ends, strict=True) if not sequence.num_pending]
        if not done:
            return []
        rows = torch.tensor([end for _, end in done], device=output.hidden.device)
        logits = self._decoder.logits(self._weights, self._prepared, output.hidden[rows])
        finished = [(sequence, logits[row]) for row, (sequence, _) in enumerate(done)]
        for sequence, row_logits in finished:
            if isinstance(sequence, Prompt):
                _result_of(sequence).logits = row_logits
        return finished

    def _forward(self, feeds: Sequence[Feed]) -> StageOutput:
        """Run the model over the feeds, filling the cache; the draft follows."""
        batch = paged_batch(feeds, page_tokens=self.options.page_tokens, device=self.options.device)
        output = self._decoder.forward_paged(self._weights, self._prepared, batch, self._pool.layers)
        if self._draft is not None:
            self._draft.follow(feeds, batch, output.hidden)
        return output

    def _keep(self, generation: _Generation, feeds: Sequence[Feed], kept: Sequence[int], output: StageOutput) -> None:
        """The first `kept` tokens of each feed stand: note where they went, and that the cache holds them."""
        dtype = np.uint8 if self.config.num_experts <= 256 else np.uint16
        routing = None
        if self.options.return_routing and output.routing is not None:
            routing = output.routing.cpu().numpy().astype(dtype)
        for feed, start, count in zip(feeds, first_rows(feeds).tolist(), kept, strict=True):
            if routing is not None:
                _record_routing(generation, feed, routing[start : start + count])
            if self._draft is not None:
                feed.sequence.state = output.hidden[start + count - 1].clone()
            generation.scheduler.fed(feed.sequence, count)

    def _draw(
        self, generation: _Generation, samples: Sequence[Sample], proposals: Sequence[Sequence[int]], logits: Tensor
    ) -> list[int]:
        """Draw the next tokens of each sample and record those that stand; returns how many do, at least one.

        logits: this rank's, after the sample's last token and after each one proposed. Collective over tp.
        """
        counts = [1 + len(proposal) for proposal in proposals]
        rows = [sample for sample, count in zip(samples, counts, strict=True) for _ in range(count)]
        positions = [len(sample.tokens) + i for sample, count in zip(samples, counts, strict=True) for i in range(count)]
        tokens = self._choose(generation, rows, positions, logits)
        log_probs, _ = self._decoder.log_probs_of_logits(logits, tokens, temperature=generation.options.temperature)
        drawn, scored, end, kept = tokens.tolist(), log_probs.tolist(), 0, []
        for sample, proposal, count in zip(samples, proposals, counts, strict=True):
            start, end = end, end + count
            standing = accepted(proposal, drawn[start:end])
            taken = slice(start, start + standing)
            kept.append(self._append(generation, sample, drawn[taken], scored[taken]))
            if proposal:
                self.num_verifications += 1
                self.num_verified_tokens += kept[-1]
                self.num_guesses += min(kept[-1], len(proposal))
                self.num_right_guesses += min(kept[-1], standing - 1)
        return kept

    def _choose(self, generation: _Generation, samples: Sequence[Sample], positions: Sequence[int], logits: Tensor) -> Tensor:
        """The token of each row's sample at its position, int64 [M], from this rank's logits. Collective over tp."""
        options, device = generation.options, logits.device
        ids = torch.from_numpy(generation.sample_ids[[sample.index for sample in samples]]).to(device)
        return draw(
            self._decoder.gather_logits(logits),
            ids,
            torch.tensor(positions, device=device),
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        ).clamp_(max=self.config.vocab_size - 1)

    def _append(self, generation: _Generation, sample: Sample, tokens: Sequence[int], log_probs: Sequence[float]) -> int:
        """Give a sample its new tokens up to the one that ends it; returns how many it took."""
        options, record = generation.options, generation.records[sample.index]
        for taken, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True), start=1):
            if not math.isfinite(log_prob):
                raise EngineError(
                    f"rollout engine: the model's log-prob after {len(sample.tokens)} tokens of sample "
                    f"{generation.sample_ids[sample.index]} is not finite; check the weights of version {self._version}"
                )
            record.log_probs.append(log_prob)
            record.stopped = token in options.stop_token_ids
            finished = record.stopped or sample.num_response + 1 >= options.max_response_tokens
            generation.scheduler.append(sample, token, finished=finished)
            if finished:
                return taken
        return len(tokens)

    def _batch(self, requests: Sequence[Request], samples: Sequence[Sample], generation: _Generation) -> SampleBatch:
        records = generation.records
        num_response = sum(sample.num_response for sample in samples)
        return SampleBatch(
            sample_id=generation.sample_ids,
            prompt_id=np.array([request.prompt_id for request in requests], dtype=np.int64),
            tokens=np.array(list(chain.from_iterable(sample.tokens for sample in samples)), dtype=np.int32),
            prompt_length=np.array([sample.num_prompt for sample in samples], dtype=np.int32),
            length=np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
            stopped=np.array([record.stopped for record in records], dtype=bool),
            rollout_log_probs=np.array(list(chain.from_iterable(r.log_probs for r in records)), dtype=np.float32),
            weight_version=np.full(num_response, self._version, dtype=np.int32),
            routing=self._routing(samples, records) if self.options.return_routing else None,
        )

    def _routing(self, samples: Sequence[Sample], records: Sequence[_Record]) -> Array:
        """[T, moe_layers, top_k]; the last token of a sequence was never fed and has zeros."""
        dtype = np.uint8 if self.config.num_experts <= 256 else np.uint16
        shape = (len(self.config.moe_layers), self.config.experts_per_token)
        rows: list[Array] = [np.zeros((0, *shape), dtype=dtype)]
        for sample, record in zip(samples, records, strict=True):
            rows += [*record.routing, np.zeros((1, *shape), dtype=dtype)]
            assert sum(len(part) for part in record.routing) == len(sample.tokens) - 1, "every fed token is recorded once"
        return np.concatenate(rows)


def _result_of(prompt: Prompt) -> _PromptResult:
    if prompt.result is None:
        prompt.result = _PromptResult()
    result: _PromptResult = prompt.result
    return result


def _record_routing(generation: _Generation, feed: Feed, rows: Array) -> None:
    """Where the tokens of a feed went, [n, moe_layers, top_k]."""
    if isinstance(feed.sequence, Sample):
        record = generation.records[feed.sequence.index]
        # a retracted sample is fed again from its prompt on: what is known of a position stays
        fresh = rows[max(0, record.num_routed - feed.start) :]
        record.routing.append(fresh)
        record.num_routed += len(fresh)
    elif isinstance(feed.sequence, Prompt):
        _result_of(feed.sequence).routing.append(rows)


def _check_parts(parts: Sequence[str]) -> None:
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"a rollout engine can put {' and '.join(_PARTS)} to sleep, not '{part}'")
