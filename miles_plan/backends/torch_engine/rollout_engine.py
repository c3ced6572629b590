"""The embedded rollout engine: continuous batching over a paged KV cache, with the trainer's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, MemoryReport, Part, Request, WeightBucket
from miles_plan.backends.torch_engine.config import read_config
from miles_plan.backends.torch_engine.decoder import Decoder, PagedBatch, StageOutput
from miles_plan.backends.torch_engine.kv_cache import FILLER_PAGE, KvPool, OutOfPagesError, PageAllocator
from miles_plan.backends.torch_engine.mesh import check_rollout_layout, open_mesh
from miles_plan.backends.torch_engine.options import RolloutEngineOptions
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.scheduler import FedSequence, Prompt, Sample, Scheduler
from miles_plan.backends.torch_engine.storage import free_storage, resident_bytes, restore_storage
from miles_plan.backends.torch_engine.weight_exchange import read_bucket
from miles_plan.backends.torch_engine.weights import Shard, load_weights, parameters, pieces_by_name, place
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import SamplingOptions
from miles_plan.kernels.attention import pack_sequences
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
        self._version = 0
        self._asleep: set[str] = set()
        self._incoming_version: int | None = None
        self._received: set[str] = set()
        self._num_running = 0
        self.num_retracted = 0

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
            self._pool.reset()  # NaN from broken weights must not stay in pages that others get
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
        self._prepared.clear()
        for name, tensor in read_bucket(bucket):
            place(self._weights, self._owned, name, tensor)
            self._received.add(name)

    def commit_weights(self, version: int) -> int:
        """Serve `version` from now on. EngineError names what is missing of it."""
        received = self._received if self._incoming_version == version else set()
        if missing := sorted(set(self._owned) - received):
            raise EngineError(
                f"rollout engine: {len(missing)} of {len(self._owned)} tensors of version {version} did not arrive, "
                f"such as '{missing[0]}'"
            )
        self._incoming_version, self._received = None, set()
        self._prepared.clear()
        self._version = version
        return version

    def sleep(self, parts: Sequence[Part]) -> MemoryReport:
        """Free the memory of "weights" (dropped, not parked) and "kv_cache". ValueError for another part."""
        _check_parts(parts)
        if "weights" in parts:
            self._version = NO_WEIGHTS
            self._prepared.clear()
            free_storage(self._weights.values())
        if "kv_cache" in parts:
            free_storage(self._pool.tensors)
        self._asleep.update(parts)
        return self._memory()

    def wake(self, parts: Sequence[Part]) -> MemoryReport:
        """Take the memory again; dropped weights must be updated and committed before the next `generate`."""
        _check_parts(parts)
        if "weights" in parts:
            restore_storage(self._weights.values())
        if "kv_cache" in parts and "kv_cache" in self._asleep:
            restore_storage(self._pool.tensors)
            self._pool.reset()
        self._asleep.difference_update(parts)
        return self._memory()

    def health(self) -> Mapping[str, Any]:
        """Version held, what sleeps, samples running, retractions so far, free pages, bytes by part."""
        return {
            "weight_version": self._version,
            "asleep": sorted(self._asleep),
            "running": self._num_running,
            "retracted": self.num_retracted,
            "free_pages": self._pages.num_free,
            "pages": self._pages.num_pages,
            "device_bytes": dict(self._memory().device_bytes),
        }

    def close(self) -> None:
        """Leave the process groups and free everything."""
        self._prepared.clear()
        free_storage([*self._weights.values(), *self._pool.tensors])
        self._asleep.update(_PARTS)
        self._mesh.close()

    def _memory(self) -> MemoryReport:
        weights = resident_bytes(self._weights.values()) + self._prepared.size_bytes
        return MemoryReport(device_bytes={"weights": weights, "kv_cache": self._pool.size_bytes}, host_bytes={})

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
        self._pool.copy_pages(step.copies)
        drawing: list[Sample] = list(step.fresh)
        logits: list[Tensor] = [self._start_fresh(generation, sample)[None] for sample in step.fresh]
        if step.prefill:
            for sequence, row in self._prefill(generation, step.prefill):
                if isinstance(sequence, Sample):
                    drawing.append(sequence)
                    logits.append(row[None])
        if step.decode:
            output = self._feed(generation, [(sample, 1) for sample in step.decode])
            drawing.extend(step.decode)
            logits.append(self._decoder.logits(self._weights, self._prepared, output.hidden))
        if drawing:
            self._draw(generation, drawing, torch.cat(logits))

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
        output = self._feed(generation, prefill)
        ends = np.cumsum([count for _, count in prefill]) - 1
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

    def _feed(self, generation: _Generation, feeds: Sequence[tuple[FedSequence, int]]) -> StageOutput:
        """Run the model over the next tokens of each sequence, filling the cache, and note where the tokens went."""
        batch = self._paged_batch(feeds)
        output = self._decoder.forward_paged(self._weights, self._prepared, batch, self._pool.layers)
        if self.options.return_routing and output.routing is not None:
            self._record_routing(generation, feeds, output.routing)
        for sequence, count in feeds:
            generation.scheduler.fed(sequence, count)
        return output

    def _paged_batch(self, feeds: Sequence[tuple[FedSequence, int]]) -> PagedBatch:
        counts = np.array([count for _, count in feeds])
        cached = np.array([sequence.num_cached for sequence, _ in feeds])
        tokens = list(chain.from_iterable(s.tokens[s.num_cached : s.num_cached + count] for s, count in feeds))
        rows = np.repeat(np.arange(len(feeds)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = cached[rows] + within
        page_tokens = self.options.page_tokens
        table = _page_table([sequence.pages for sequence, _ in feeds], -(-int((cached + counts).max()) // page_tokens))
        device = self.options.device

        def on_device(values: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

        return PagedBatch(
            tokens=torch.tensor(tokens, device=device),
            positions=on_device(positions),
            page=on_device(table[rows, positions // page_tokens]),
            offset=on_device(positions % page_tokens),
            page_table=on_device(table),
            context_tokens=on_device(cached),
            sequences=None if (counts == 1).all() else pack_sequences(counts.tolist(), device=device),
        )

    def _record_routing(self, generation: _Generation, feeds: Sequence[tuple[FedSequence, int]], routing: Tensor) -> None:
        dtype = np.uint8 if self.config.num_experts <= 256 else np.uint16
        rows = routing.cpu().numpy().astype(dtype)
        end = 0
        for sequence, count in feeds:
            start, end = end, end + count
            if isinstance(sequence, Sample):
                record = generation.records[sequence.index]
                # a retracted sample is fed again from its prompt on: what is known of a position stays
                fresh = rows[min(end, start + record.num_routed - sequence.num_cached) : end]
                record.routing.append(fresh)
                record.num_routed += len(fresh)
            elif isinstance(sequence, Prompt):
                _result_of(sequence).routing.append(rows[start:end])

    def _draw(self, generation: _Generation, samples: Sequence[Sample], logits: Tensor) -> None:
        """Draw the next token of each sample from this rank's logits and record it. Collective over tp."""
        options, device = generation.options, logits.device
        ids = torch.from_numpy(generation.sample_ids[[sample.index for sample in samples]]).to(device)
        positions = torch.tensor([len(sample.tokens) for sample in samples], device=device)
        tokens = draw(
            self._decoder.gather_logits(logits),
            ids,
            positions,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        ).clamp_(max=self.config.vocab_size - 1)
        log_probs, _ = self._decoder.log_probs_of_logits(logits, tokens, temperature=options.temperature)
        if not bool(torch.isfinite(log_probs).all()):
            broken = samples[int((~torch.isfinite(log_probs)).nonzero()[0])]
            raise EngineError(
                f"rollout engine: the model's log-prob after {len(broken.tokens)} tokens of sample "
                f"{generation.sample_ids[broken.index]} is not finite; check the weights of version {self._version}"
            )
        stop = frozenset(options.stop_token_ids)
        for sample, token, log_prob in zip(samples, tokens.tolist(), log_probs.tolist(), strict=True):
            record = generation.records[sample.index]
            record.log_probs.append(log_prob)
            record.stopped = token in stop
            finished = record.stopped or sample.num_response + 1 >= options.max_response_tokens
            generation.scheduler.append(sample, token, finished=finished)

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


def _page_table(pages: Sequence[Sequence[int]], width: int) -> Array:
    """[B, width] page numbers, padded with the filler page."""
    table = np.full((len(pages), width), FILLER_PAGE, dtype=np.int64)
    lengths = np.array([min(len(row), width) for row in pages])
    table[np.arange(width) < lengths[:, None]] = list(chain.from_iterable(row[:width] for row in pages))
    return table


def _check_parts(parts: Sequence[str]) -> None:
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"a rollout engine can put {' and '.join(_PARTS)} to sleep, not '{part}'")
