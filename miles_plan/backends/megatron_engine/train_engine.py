"""The Megatron trainer: one rank of it, over Megatron's tensor, sequence, pipeline, context, expert and data parallelism."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.engine import (
    EngineError,
    RankLogProbs,
    WhichModel,
)
from miles_plan.backends.megatron_engine.arguments import MegatronArguments, derive_arguments
from miles_plan.backends.megatron_engine.full_weights import fill_full, full_tensors, load_held
from miles_plan.backends.megatron_engine.layout_checks import layout_problems
from miles_plan.backends.megatron_engine.micro_batches import MicroBatch, empty_batch_result, micro_batches
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.ranks import place_of_rank
from miles_plan.backends.megatron_engine.routing_replay import RoutingReplay
from miles_plan.backends.megatron_engine.versions import require_megatron
from miles_plan.backends.megatron_engine.weight_map import LocalParameter, local_parameters
from miles_plan.backends.training.agreement import raise_together
from miles_plan.backends.training.batch_loss import BatchLoss, missing_columns
from miles_plan.backends.training.cluster_trainer import ClusterTrainer
from miles_plan.backends.training.decoder_config import DecoderConfig, read_config
from miles_plan.backends.training.device_allocator import use_expandable_segments
from miles_plan.backends.training.host_store import HostStore
from miles_plan.backends.training.packed_samples import batch_problems
from miles_plan.backends.training.scores import SumOverGroup, VocabParallelScores
from miles_plan.backends.training.state_files import check_state, read_state, write_state
from miles_plan.backends.weight_transport.publisher import WeightPublisher
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import LossOptions, OptimizerOptions
from miles_plan.kernels.cuda.log_prob import log_prob

Scored = Callable[[MicroBatch, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """A model this rank holds a part of: the policy (and, with other weights, the reference) or the teacher."""

    config: DecoderConfig
    chunks: list[torch.nn.Module]  # bare GPTModels
    held: list[tuple[LocalParameter, Tensor]]
    replay: RoutingReplay
    columns: list[list[int]]  # of a routing record, by chunk


class MegatronTrainEngine(ClusterTrainer):
    """One rank of a Megatron trainer; a `TrainEngine` and a `DeviceWeightSource`.

    Every rank is made with the same options and rendezvous and takes the same calls. A process group that exists already is
    used and left alone; else the engine starts one and ends it. ValueError for options, a layout or a model that cannot be
    trained, EngineError for a package that is missing or a combination that Megatron refuses.
    """

    engine = "megatron"
    options: MegatronEngineOptions

    def __init__(self, options: MegatronEngineOptions, *, rank: int = 0, rendezvous: str | None = None) -> None:
        from miles_plan.backends.megatron_engine import model

        require_megatron(transformer_engine=options.layers == "transformer_engine", deterministic=options.deterministic)
        self.options = options
        self.config = read_config(options.model_directory)
        self.arguments = _checked_arguments(self.config, options)
        self.rank, self.place = rank, place_of_rank(options.layout, rank)
        self._owns_groups = not dist.is_initialized()
        use_expandable_segments(options.device)
        model.open_groups(options, self.arguments, rank, rendezvous)
        self._policy = self._build(options.model_directory, self.config, self.arguments)
        self._wrapped, self._optimizer = self._wrap()
        self._reference = [tensor.detach().clone() for _, tensor in self._policy.held] if options.keep_reference else []
        self._teacher: _Model | None = None
        if options.teacher_directory is not None:
            config = read_config(options.teacher_directory)
            self._teacher = self._build(options.teacher_directory, config, _checked_arguments(config, options))
        self._host = HostStore(options.host_directory / f"rank_{rank:05d}")
        self._publisher = WeightPublisher(full_tensors(self.config, self._dtype), self._fill, options.device)
        if options.optimizer_offload:
            self.offload(["optimizer"])
        if options.reference_offload and self._tensors_of_part("reference"):
            self.offload(["reference"])

    def log_probs(self, batch: SampleBatch, *, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        """Log-probs and entropies of this rank's share; see `TrainEngine`. EngineError for a batch the model cannot take."""
        if model != "policy":
            self._model(model)
            with self._frozen_at_hand():
                return self._log_probs(batch, model, temperature, replay_routing)
        self._need_resident("weights")
        return self._log_probs(batch, model, temperature, replay_routing)

    def _log_probs(self, batch: SampleBatch, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        chosen = self._model(model)
        parts = self._micro_batches(batch, chosen.config, replay_routing)
        if not parts:
            return empty_batch_result()
        parts.sort(key=lambda part: len(part.packed.targets), reverse=True)  # the first logits leave room for all that follow
        found: list[tuple[MicroBatch, Tensor]] = []

        def keep(part: MicroBatch, log_probs: Tensor, entropy: Tensor) -> Tensor:
            found.append((part, torch.stack([log_probs, entropy])))
            return log_probs.sum()

        with torch.no_grad(), self._weights_of(model):
            self._run(chosen, chosen.chunks, parts, keep, temperature, forward_only=True, entropy_counts=False)
        if not self._speaks:
            found = []
        scored = torch.cat([each for _, each in found], dim=1).cpu().numpy() if found else np.zeros((2, 0), dtype=np.float32)
        samples = [part.packed.samples for part, _ in found]
        return RankLogProbs(
            sample_index=np.concatenate([*samples, np.zeros(0, dtype=np.int64)]),
            log_probs=scored[0],
            entropy=scored[1],
            routing_mismatches=chosen.replay.mismatches,
            routing_compared=chosen.replay.compared,
        )

    def train_step(
        self,
        batch: SampleBatch,
        *,
        loss: LossOptions,
        optimizer: OptimizerOptions,
        replay_routing: bool,
        temperature: float = 1.0,
    ) -> Mapping[str, float]:
        """One optimizer step; see `TrainEngine`. `temperature` is the one the batch was sampled at.

        Metrics: loss and token means of its terms, tokens, grad_norm, learning_rate, skipped_steps, and with replay
        routing_mismatches and routing_compared. A batch without a token that counts, and gradients that are not finite, skip
        the step. EngineError for a batch the loss or the model cannot take.
        """
        if missing := list(missing_columns(batch, loss)):
            raise EngineError(f"train engine: the batch lacks the columns {missing}; it has {sorted(batch.columns)}")
        self._need_resident("weights", "gradients", "optimizer")
        parts = self._micro_batches(batch, self.config, replay_routing)
        batch_loss = BatchLoss(batch, loss)
        names = list(batch_loss.metrics_of_nothing())
        if not batch_loss.num_tokens:
            return {**dict.fromkeys(names, 0.0), "tokens": 0.0, **self._optimizer.skip(optimizer)}
        sums = torch.zeros(len(names), dtype=torch.float32, device=self.options.device)

        def score(part: MicroBatch, log_probs: Tensor, entropy: Tensor) -> Tensor:
            value, metrics = batch_loss.of(part.packed, log_probs, entropy)
            sums.add_(torch.stack([metrics[name].detach().float() for name in names]))
            return value

        self._optimizer.begin()
        counts = bool(loss.entropy_coef)
        self._run(self._policy, self._wrapped, parts, score, temperature, forward_only=False, entropy_counts=counts)
        found = self._sum_over_ranks(dict(zip(names, sums.tolist(), strict=True)), replay_routing)
        with self._optimizer_at_hand():
            metrics_of_step = self._optimizer.step(optimizer)
        return {**found, "tokens": float(batch_loss.num_tokens), **metrics_of_step}

    def _copy_to_reference(self) -> None:
        for copy, (_, tensor) in zip(self._reference, self._policy.held, strict=True):
            copy.copy_(tensor.detach())

    def save(self, directory: Path) -> Sequence[str]:
        """Write weights, masters, moments, counts, reference and generators in torch.distributed.checkpoint's format."""
        self._need_resident("weights", "optimizer")
        with self._optimizer_at_hand(), self._frozen_at_hand():
            return write_state(directory, self._state(), self._identity(), rank=self.rank)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote for the same model, dtype and layout, bit for bit. EngineError names what differs."""
        self._need_resident("weights", "optimizer")
        error = None
        try:
            check_state(directory, self._identity(), rank=self.rank)
        except EngineError as caught:
            error = caught
        raise_together(error, f"train engine: loading {directory}", device=self.options.device)
        found = read_state(directory, rank=self.rank)
        with torch.no_grad():
            for parameter, tensor in self._policy.held:
                tensor.copy_(found[f"weights/{parameter.chunk}/{parameter.name}"])
            with self._frozen_at_hand():
                for index, copy in enumerate(self._reference):
                    copy.copy_(found[f"reference/{index}"])
        prefix = "optimizer/"
        states = {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}
        with self._optimizer_at_hand():
            self._optimizer.restore(states, found["step_counts"])
        _restore_generators(found, self.options.device)

    def close(self) -> None:
        """Free everything; end the process groups if this engine started them."""
        self._free()
        if self._owns_groups and dist.is_initialized():
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    @property
    def _speaks(self) -> bool:
        """Of the ranks that compute the same scores, this one reports them."""
        return self.place.pp == self.options.layout.pp - 1 and self.place.tp == 0 and self.place.cp == 0

    def _build(self, directory: Path, config: DecoderConfig, arguments: MegatronArguments) -> _Model:
        from miles_plan.backends.megatron_engine import model

        transformer = model.transformer_config(arguments)
        chunks = model.build_chunks(config, arguments, transformer)
        named = model.parameters_by_name(chunks)
        wanted = local_parameters(config, self.options.layout, self.rank, layers=self.options.layers)
        held = _match(named, wanted)
        load_held(directory, config, held)
        replay = RoutingReplay()
        columns: list[list[int]] = [[] for _ in chunks]
        routers = list(model.routers_of(chunks, config))
        for number, column, _ in routers:
            columns[number].append(column)
        replay.attach((column, router) for _, column, router in routers)
        return _Model(config, chunks, held, replay, columns)

    def _wrap(self) -> tuple[list[torch.nn.Module], Any]:
        """The policy's chunks with gradient buffers, and the optimizer over them."""
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        from miles_plan.backends.megatron_engine.model import fuse_gradient_accumulation
        from miles_plan.backends.megatron_engine.policy_optimizer import PolicyOptimizer

        data_parallel = self.arguments.data_parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=data_parallel.grad_reduce_in_fp32,
            overlap_grad_reduce=data_parallel.overlap_grad_reduce,
            overlap_param_gather=data_parallel.overlap_param_gather,
            use_distributed_optimizer=data_parallel.use_distributed_optimizer,
        )
        wrapped: list[torch.nn.Module] = []
        for chunk in self._policy.chunks:
            config: Any = chunk.config
            if self.arguments.precision.gradient_accumulation_fusion:
                fuse_gradient_accumulation(chunk)
            # Our losses are normalised already: gradients are summed over replicas, and not divided by a count of tokens.
            config.finalize_model_grads_func = lambda chunks, _tokens, **given: finalize_model_grads(chunks, None, **given)
            wrapped.append(DistributedDataParallel(config, settings, chunk))
        return wrapped, PolicyOptimizer(self.arguments, wrapped)

    def _model(self, which: WhichModel) -> _Model:
        if which == "policy" or (which == "reference" and self._reference):
            return self._policy
        if which == "teacher" and self._teacher is not None:
            return self._teacher
        option = "keep_reference" if which == "reference" else "teacher_directory"
        raise EngineError(f"train engine: it holds no {which} model; set {option}")

    def _weights_of(self, which: WhichModel) -> _SwappedWeights:
        tensors = [tensor for _, tensor in self._policy.held]
        return _SwappedWeights(tensors, self._reference if which == "reference" else [])

    def _micro_batches(self, batch: SampleBatch, config: DecoderConfig, replay_routing: bool) -> list[MicroBatch]:
        if problems := list(batch_problems(batch, config, replay_routing=replay_routing)):
            raise EngineError("train engine: " + "; ".join(problems))
        return micro_batches(batch, self.options, self.place, replay_routing=replay_routing)

    def _run(
        self,
        model: _Model,
        chunks: list[torch.nn.Module],
        parts: Sequence[MicroBatch],
        scored: Scored,
        temperature: float,
        *,
        forward_only: bool,
        entropy_counts: bool,
    ) -> None:
        """Megatron's schedule over the micro-batches; `scored` gets each one's scores on the last stage and gives its loss.

        entropy_counts: the loss depends on entropies, so that they have a gradient.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from miles_plan.backends.megatron_engine.model import invariant_arithmetic

        model.replay.reset()
        bare = [id(chunk) for chunk in model.chunks]

        def forward(batches: Iterator[int], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            part = parts[next(batches)]
            number = bare.index(id(getattr(chunk, "module", chunk)))
            model.replay.begin(part.replay, part.counted, model.columns[number])
            output = self._forward(chunk, model, part, temperature, entropy_counts)
            model.replay.end()

            def loss(scores: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                return scored(part, scores[0], scores[1]), torch.ones((), dtype=torch.int, device=scores.device), {}

            return output, loss

        with invariant_arithmetic(self.options.layers):
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(range(len(parts))) for _ in chunks],
                model=chunks,
                num_microbatches=len(parts),
                seq_length=int(parts[0].fed.cumulative_lengths[-1]),  # of all, where stages do not tell each other the lengths
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward(self, chunk: Any, model: _Model, part: MicroBatch, temperature: float, entropy_counts: bool) -> Tensor:
        """Hidden states; on the last chunk scores [2, r]: log-probs and entropies of the response tokens."""
        from megatron.core.packed_seq_params import PackedSeqParams

        fed = part.fed
        sequences = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=fed.cumulative_lengths,
            cu_seqlens_kv=fed.cumulative_lengths,
            max_seqlen_q=fed.longest,
            max_seqlen_kv=fed.longest,
        )
        output: Tensor = chunk(
            input_ids=fed.tokens[None],
            position_ids=torch.zeros_like(fed.tokens)[None],  # RoPE takes positions from the sequences
            attention_mask=None,
            packed_seq_params=sequences,
            output_processor=lambda **given: self._score(model, part, temperature, entropy_counts, **given),
        )
        return output

    def _score(
        self,
        model: _Model,
        part: MicroBatch,
        temperature: float,
        entropy_counts: bool,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Megatron's output hook: rows that predict a response, their logits, their scores, summed over cp ranks."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        layout, packed = self.options.layout, part.packed
        if layout.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        rows = hidden_states[:, 0].index_select(0, part.fed.predicting)
        logits, _bias = output_layer(rows[:, None], weight=output_weight)
        share = self.arguments.model.padded_vocab_size // layout.tp
        first, stop = (min((self.place.tp + end) * share, model.config.vocab_size) for end in (0, 1))
        group = parallel_state.get_tensor_model_parallel_group()
        targets = packed.targets[part.fed.predicted]
        logits = logits[:, 0]
        exact = self.options.layers == "batch_invariant"
        # exact log-probs have a gradient of their own; a second one of zeros would be written and added over all the logits
        scored = logits.detach() if exact and not entropy_counts else logits
        log_probs, entropy = _apply(VocabParallelScores, scored, targets, first, stop, temperature or 1.0, group)
        if exact:
            log_probs = log_prob(
                logits,
                targets,
                temperature=temperature or 1.0,
                vocab_start=first,
                vocab_size=model.config.vocab_size,
                group=group if layout.tp > 1 else None,
            )
        scores = torch.stack([log_probs, entropy])
        if layout.cp == 1:
            return scores
        whole = scores.new_zeros(2, len(packed.targets)).index_copy(1, part.fed.predicted, scores)
        summed: Tensor = _apply(SumOverGroup, whole, parallel_state.get_context_parallel_group())
        return summed

    def _fill(self, flat: Tensor, views: Mapping[str, Tensor]) -> None:
        fill_full(flat, views, self._policy.held, self.options.layout)

    def _sum_over_ranks(self, sums: Mapping[str, float], replay_routing: bool) -> dict[str, float]:
        """Sums over all ranks; of those that compute the same losses one counts. Routing is counted where it happens."""
        own = {name: value if self._speaks else 0.0 for name, value in sums.items()}
        if replay_routing:
            own |= {"routing_mismatches": self._policy.replay.mismatches, "routing_compared": self._policy.replay.compared}
        total = torch.tensor(list(own.values()), dtype=torch.float64, device=self.options.device)
        if self.options.layout.world_size > 1:
            dist.all_reduce(total)
        return dict(zip(own, total.tolist(), strict=True))

    def _tensors_of_part(self, part: str) -> list[Tensor]:
        """The tensors behind a part. The teacher is frozen like the reference and goes with it."""
        weights = [tensor.detach() for _, tensor in self._policy.held]
        if part == "weights":
            return weights
        if part == "gradients":
            return list(self._optimizer.gradients())
        if part == "optimizer":  # float32 weights are their own masters and stay with the weights
            shared = {tensor.untyped_storage()._cdata for tensor in weights}
            states = (tensor.detach() for tensor in self._optimizer.tensors().values())
            return [tensor for tensor in states if tensor.untyped_storage()._cdata not in shared]
        return [*self._reference, *([tensor.detach() for _, tensor in self._teacher.held] if self._teacher else [])]

    def _state(self) -> dict[str, Tensor]:
        weights = {f"weights/{each.chunk}/{each.name}": tensor for each, tensor in self._policy.held}
        optimizer = {f"optimizer/{name}": tensor for name, tensor in self._optimizer.tensors().items()}
        reference = {f"reference/{index}": tensor for index, tensor in enumerate(self._reference)}
        counts = {"step_counts": self._optimizer.step_counts()}
        return {**weights, **optimizer, **reference, **counts, **_generators(self.options.device)}

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must have been written with to fit this rank."""
        return {
            "model": hashlib.sha256(repr(self.config).encode()).hexdigest()[:16],
            "dtype": self.options.dtype,
            "layout": repr(self.options.layout),
            "layers": self.options.layers,
            "rank": str(self.rank),
        }


class _SwappedWeights:
    """While it lasts, the parameters hold other tensors; nothing is copied. With no others it does nothing."""

    def __init__(self, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._parameters = parameters if others else []
        self._others = others
        self._own = [parameter.data for parameter in self._parameters]

    def __enter__(self) -> None:
        for parameter, other in zip(self._parameters, self._others, strict=True):
            parameter.data = other

    def __exit__(self, *_: object) -> None:
        for parameter, own in zip(self._parameters, self._own, strict=True):
            parameter.data = own


def _checked_arguments(config: DecoderConfig, options: MegatronEngineOptions) -> MegatronArguments:
    if problems := list(layout_problems(config, options.layout, layers=options.layers)):
        raise ValueError("the Megatron trainer cannot take this model and layout: " + "; ".join(problems))
    return derive_arguments(config, options)


def _match(named: Mapping[tuple[int, str], Tensor], wanted: Sequence[LocalParameter]) -> list[tuple[LocalParameter, Tensor]]:
    """Each parameter of the map with Megatron's own; EngineError when this Megatron names or shapes them otherwise."""
    if unknown := named.keys() ^ {(each.chunk, each.name) for each in wanted}:
        raise EngineError(f"megatron train engine: the weight map and this Megatron disagree on {sorted(unknown)[:4]}")
    for each in wanted:
        if tuple(named[each.chunk, each.name].shape) != each.shape:
            raise EngineError(
                f"megatron train engine: '{each.name}' has shape {list(named[each.chunk, each.name].shape)} in this Megatron, "
                f"the weight map says {list(each.shape)}"
            )
    return [(each, named[each.chunk, each.name]) for each in wanted]


def _apply(function: Any, *arguments: Any) -> Any:
    """An autograd function's apply, which has no annotations."""
    return function.apply(*arguments)


def _generators(device: str) -> dict[str, Tensor]:
    """States of the random generators: torch's, the GPU's, and Megatron's for each kind of parallelism."""
    found = {"generator/cpu": torch.get_rng_state()}
    if device == "cuda":
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        found["generator/cuda"] = torch.cuda.get_rng_state()
        states = get_cuda_rng_tracker().get_states()
        found |= {f"generator/megatron/{name}": state for name, state in states.items() if isinstance(state, Tensor)}
    return found


def _restore_generators(found: Mapping[str, Tensor], device: str) -> None:
    torch.set_rng_state(found["generator/cpu"])
    if device == "cuda":
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        torch.cuda.set_rng_state(found["generator/cuda"])
        prefix = "generator/megatron/"
        states = {name.removeprefix(prefix): state for name, state in found.items() if name.startswith(prefix)}
        get_cuda_rng_tracker().set_states(get_cuda_rng_tracker().get_states() | states)
