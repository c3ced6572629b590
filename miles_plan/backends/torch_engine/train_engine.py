"""The embedded trainer: one rank of it, over data, tensor, pipeline and expert parallel ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, MemoryReport, Part, RankLogProbs, WeightBucket, WhichModel
from miles_plan.backends.torch_engine.agreement import raise_together
from miles_plan.backends.torch_engine.decoder import Decoder
from miles_plan.backends.torch_engine.draft_trainer import DraftTrainer, drafted_rows, num_drafted
from miles_plan.backends.torch_engine.exported_weights import ExportedWeights
from miles_plan.backends.torch_engine.mesh import Mesh, check_train_layout, open_mesh
from miles_plan.backends.torch_engine.optimizer import ShardedAdamW
from miles_plan.backends.torch_engine.options import TrainEngineOptions
from miles_plan.backends.torch_engine.parameter_buffers import BufferedParameter, ParameterBuffer
from miles_plan.backends.torch_engine.pipeline import StageLinks, run_forward, run_forward_backward
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.weights import Parameter, Shard, Weights, load_weights, parameters, shard_of_rank
from miles_plan.backends.training.batch_loss import BatchLoss, missing_columns
from miles_plan.backends.training.decoder_config import DecoderConfig, read_config
from miles_plan.backends.training.host_store import HostStore
from miles_plan.backends.training.micro_batches import micro_batches_of_rank
from miles_plan.backends.training.packed_samples import PackedSamples, batch_problems, pack_samples
from miles_plan.backends.training.shard_files import read_tensors, write_tensors
from miles_plan.backends.training.storage import free_storage, resident_bytes, restore_storage
from miles_plan.backends.weight_transport.shared_memory import SharedMemoryWriter
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import LossOptions, OptimizerOptions

_PARTS = ("weights", "gradients", "optimizer", "reference")


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """A model this rank holds a part of: the policy, the reference or the teacher."""

    config: DecoderConfig
    decoder: Decoder
    weights: Weights
    prepared: PreparedWeights
    links: StageLinks


class _RoutingCount:
    """(token, layer) pairs whose experts were replayed, and those where the router would have chosen others."""

    def __init__(self) -> None:
        self.mismatches = 0
        self.compared = 0


class TorchTrainEngine:
    """One rank of the embedded trainer; a `TrainEngine`.

    Every rank is made with the same options and rendezvous and takes the same calls. The forward is the rollout engine's
    arithmetic, so log-probs are its bits; there is no dropout and no other randomness, so the same calls give the same bits.
    Raises ValueError for options or a model it cannot train.
    """

    def __init__(
        self, options: TrainEngineOptions, *, rank: int = 0, rendezvous: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.options = options
        self.config = read_config(options.model_directory)
        check_train_layout(options.layout, self.config)
        self._dtype = getattr(torch, options.dtype)
        self._mesh = open_mesh(options.layout, rank, rendezvous=rendezvous, host=host)
        self._shard = shard_of_rank(self._mesh, options.layout, self.config)
        initial = load_weights(options.model_directory, self.config, self._shard, dtype=torch.float32, device=options.device)
        self._buffers = _buffers(parameters(self.config, self._shard), self._mesh, self._dtype, options.device)
        masters = [buffer.flatten(initial)[buffer.chunk].clone() for buffer in self._buffers]
        self._optimizer = ShardedAdamW(self._buffers, masters, self._mesh.world)
        self._optimizer.publish()
        self._policy = self._model_of(self.config, self._shard, _merged(buffer.parameters for buffer in self._buffers))
        self._reference_flats: list[Tensor] = []
        self._frozen: dict[WhichModel, _Model] = {}
        if options.keep_reference:
            self._reference_flats = [buffer.weights.clone() for buffer in self._buffers]
            views = (buffer.views(flat) for buffer, flat in zip(self._buffers, self._reference_flats, strict=True))
            self._frozen["reference"] = self._model_of(self.config, self._shard, _merged(views))
        if options.teacher_directory is not None:
            self._frozen["teacher"] = self._load_teacher(options.teacher_directory)
        self._draft: DraftTrainer | None = None
        if options.draft:
            self._draft = DraftTrainer(self.config, self._mesh, dtype=self._dtype, device=options.device, seed=options.seed)
        self._host = HostStore(options.host_directory / f"rank_{rank:05d}")
        self._writer = SharedMemoryWriter()

    def log_probs(self, batch: SampleBatch, *, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        """Log-probs and entropies of this rank's share; see `TrainEngine`. EngineError for a batch the model cannot take."""
        chosen = self._model(model)
        self._need_resident("weights" if model == "policy" else "reference")
        parts = self._pack(batch, chosen.config, replay_routing)
        routing = _RoutingCount()

        def forward(index: int, hidden: Tensor | None) -> Tensor:
            output = self._run_stage(chosen, parts[index], hidden, routing)
            if not chosen.links.is_last:
                return output
            return torch.stack(self._score(chosen, parts[index], output, temperature))

        with torch.no_grad():
            results = run_forward(chosen.links, [len(part.tokens) for part in parts], forward)
        if self._mesh.tp.rank:
            results, routing = [], _RoutingCount()
        scored = torch.cat([*results, torch.zeros(2, 0, device=self.options.device)], dim=1).cpu().numpy()
        samples = [part.samples for part in parts] if results else []
        return RankLogProbs(
            sample_index=np.concatenate([*samples, np.zeros(0, dtype=np.int64)]),
            log_probs=scored[0],
            entropy=scored[1],
            routing_mismatches=routing.mismatches,
            routing_compared=routing.compared,
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
        the step. The optional column `loss_mask` takes tokens out. EngineError for a batch the loss or the model cannot take.
        """
        if missing := list(missing_columns(batch, loss)):
            raise EngineError(f"train engine: the batch lacks the columns {missing}; it has {sorted(batch.columns)}")
        self._need_resident("weights", "gradients", "optimizer")
        parts = self._pack(batch, self.config, replay_routing)
        batch_loss = BatchLoss(batch, loss)
        sums, routing = batch_loss.metrics_of_nothing(), _RoutingCount()
        if not batch_loss.num_tokens:
            return {**sums, "tokens": 0.0, **self._optimizer.skip(optimizer)}
        policy = self._policy

        def forward(index: int, hidden: Tensor | None) -> Tensor:
            output = self._run_stage(policy, parts[index], hidden, routing)
            if not policy.links.is_last:
                return output
            log_probs, entropy = self._score(policy, parts[index], output, temperature)
            value, metrics = batch_loss.of(parts[index], log_probs, entropy)
            for name, metric in metrics.items():
                sums[name] += float(metric)
            return value

        for buffer in self._buffers:
            buffer.gradients.zero_()
        run_forward_backward(policy.links, [len(part.tokens) for part in parts], forward)
        if replay_routing:
            sums |= {"routing_mismatches": routing.mismatches, "routing_compared": routing.compared}
        metrics = {**self._sum_over_ranks(sums), "tokens": float(batch_loss.num_tokens), **self._optimizer.step(optimizer)}
        policy.prepared.clear()
        return metrics

    def draft_step(self, batch: SampleBatch, *, optimizer: OptimizerOptions) -> Mapping[str, float]:
        """One optimizer step of the draft; see `TrainEngine`. EngineError without `draft`."""
        if self._draft is None:
            raise EngineError("train engine: it holds no draft; set draft")
        self._need_resident("weights", "gradients", "optimizer")
        parts = self._pack(batch, self.config, replay_routing=False)
        count, draft, decoder = num_drafted(batch), self._draft, self._policy.decoder
        frozen = {name: tensor.detach() for name, tensor in self._policy.weights.items()}
        prepared, sums = PreparedWeights(), {"draft_loss": 0.0, "draft_accuracy": 0.0}
        draft.buffer.gradients.zero_()
        for part in parts:
            with torch.no_grad():
                states = self._run_stage(self._policy, part, None, _RoutingCount())
            rows = drafted_rows(batch, part)
            if not bool(rows.any()):
                continue
            loss, right = draft.learn(decoder, frozen, prepared, part, states, rows)
            torch.autograd.backward(loss / count)
            sums["draft_loss"] += float(loss.detach()) / count
            sums["draft_accuracy"] += right / count
        taken = draft.optimizer.step(optimizer) if count else draft.optimizer.skip(optimizer)
        return {
            **self._sum_over_ranks(sums),
            "draft_tokens": float(count),
            "draft_grad_norm": taken["grad_norm"],
            "draft_skipped_steps": taken["skipped_steps"],
        }

    def snapshot_reference(self) -> None:
        """From now on the reference model is the policy as it is. EngineError without `keep_reference`."""
        self._model("reference")
        self._need_resident("weights", "reference")
        for buffer, flat in zip(self._buffers, self._reference_flats, strict=True):
            flat.copy_(buffer.weights)
        self._frozen["reference"].prepared.clear()

    def export_weights(self, version: int, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Publish the weights, a draft's too, in shared memory; see `TrainEngine`. Every rank must run it to its end."""
        self._need_resident("weights")
        draft = self._draft.exported() if self._draft is not None else {}
        yield from self._exported().publish(self._writer, version, bucket_bytes, draft)

    def release_weights(self, version: int) -> None:
        """Remove the shared memory of that version."""
        self._writer.release(version)

    def offload(self, parts: Sequence[Part]) -> MemoryReport:
        """Park parts below `host_directory` (pinned memory on a GPU); gradients are dropped. ValueError for another part."""
        for part in _known(parts):
            if part == "gradients":
                free_storage(self._tensors_of_part(part))
                continue
            for model in self._models_of_part(part):
                model.prepared.clear()
            self._host.offload(part, self._tensors_of_part(part))
        return self.memory()

    def onload(self, parts: Sequence[Part]) -> MemoryReport:
        """Bring parts back bit for bit; a no-op for what is resident."""
        for part in _known(parts):
            if part == "gradients":
                restore_storage(self._tensors_of_part(part))
            else:
                self._host.onload(part)
        return self.memory()

    def save(self, directory: Path) -> Sequence[str]:
        """Write this rank's masters, moments and step counts, and the reference; the weights are the masters, rounded."""
        self._need_resident("optimizer", "reference")
        name = _shard_name(self._mesh.rank)
        write_tensors(directory / name, self._state(), self._identity())
        return [name]

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote for the same model, dtype, layout and rank, bit for bit. EngineError names what differs."""
        self._need_resident("weights", "optimizer", "reference")
        found, error = {}, None
        try:
            found = read_tensors(directory / _shard_name(self._mesh.rank), self._state(), self._identity())
        except EngineError as caught:
            error = caught
        raise_together(error, self._mesh.world, f"train engine: loading {directory}")
        for name, tensor in self._optimizer.tensors().items():
            tensor.copy_(found[name])
        self._optimizer.steps_taken = int(found["steps_taken"])
        self._optimizer.publish()
        if self._draft is not None:
            self._draft.restore(found)
        self._policy.prepared.clear()
        for index, (buffer, flat) in enumerate(zip(self._buffers, self._reference_flats, strict=False)):
            flat.copy_(buffer.gather_chunks(found[f"buffer{index}.reference"].to(flat.device)))
            self._frozen["reference"].prepared.clear()

    def export_checkpoint(self, directory: Path) -> list[str]:
        """Write a Hugging Face checkpoint of the policy; collective. Returns the file names on rank 0, nothing on others."""
        self._need_resident("weights")
        return self._exported().write_checkpoint(directory, self.options.model_directory)

    def weights_sha256(self) -> str:
        """SHA-256 over the policy's full tensors, the same on every rank and for every layout; collective."""
        self._need_resident("weights")
        return self._exported().sha256()

    def memory(self) -> MemoryReport:
        """Bytes by part, weights with the forms prepared of them."""
        device = {part: resident_bytes(self._tensors_of_part(part)) for part in _PARTS}
        for part in ("weights", "reference"):
            device[part] += sum(model.prepared.size_bytes for model in self._models_of_part(part))
        return MemoryReport(device_bytes=device, host_bytes=self._host.host_bytes)

    def close(self) -> None:
        """Leave the process groups, remove shared memory and parked files, free everything."""
        self._writer.close()
        self._host.close()
        for part in _PARTS:
            free_storage(self._tensors_of_part(part))
        self._mesh.close()

    def _model_of(self, config: DecoderConfig, shard: Shard, weights: Weights) -> _Model:
        decoder = Decoder(config, shard, self._mesh, device=self.options.device)
        links = StageLinks(self._mesh.pp, self._dtype, config.hidden_size, self.options.device)
        return _Model(config, decoder, weights, PreparedWeights(), links)

    def _load_teacher(self, directory: Path) -> _Model:
        config = read_config(directory)
        check_train_layout(self.options.layout, config)
        shard = shard_of_rank(self._mesh, self.options.layout, config)
        weights = load_weights(directory, config, shard, dtype=self._dtype, device=self.options.device)
        return self._model_of(config, shard, weights)

    def _model(self, which: WhichModel) -> _Model:
        if which == "policy":
            return self._policy
        if which not in self._frozen:
            option = "keep_reference" if which == "reference" else "teacher_directory"
            raise EngineError(f"train engine: it holds no {which} model; set {option}")
        return self._frozen[which]

    def _pack(self, batch: SampleBatch, config: DecoderConfig, replay_routing: bool) -> list[PackedSamples]:
        """This data-parallel rank's micro-batches. Expert ranks exchange tokens in every layer, so they run equally many."""
        if problems := list(batch_problems(batch, config, replay_routing=replay_routing)):
            raise EngineError("train engine: " + "; ".join(problems))
        answered = np.flatnonzero(batch.response_length > 0)
        shares = micro_batches_of_rank(
            batch.length[answered] - 1,
            rank=self._mesh.dp.rank,
            ranks=self._mesh.dp.size,
            budget_tokens=self.options.micro_batch_tokens,
            lockstep=self._mesh.ep.size > 1,
        )
        device = self.options.device
        return [pack_samples(batch, answered[share], replay_routing=replay_routing, device=device) for share in shares]

    def _run_stage(self, model: _Model, part: PackedSamples, hidden: Tensor | None, routing: _RoutingCount) -> Tensor:
        """This stage's hidden states of a micro-batch."""
        decoder = model.decoder
        replay = None
        if part.replay is not None:
            columns = [model.config.moe_layers.index(layer) for layer in decoder.moe_layers]
            replay = part.replay[:, columns]
        if hidden is None:
            hidden = decoder.embed(model.weights, part.tokens)
        output = decoder.forward_packed(
            model.weights, model.prepared, hidden, part.sequences, replay=replay, recompute=self.options.recompute
        )
        routing.mismatches += output.mismatches
        routing.compared += output.compared
        return output.hidden

    def _score(self, model: _Model, part: PackedSamples, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies at the response tokens, from the last stage's hidden states."""
        predicting = hidden.index_select(0, part.predicting)
        return model.decoder.log_probs(model.weights, model.prepared, predicting, part.targets, temperature=temperature)

    def _sum_over_ranks(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks, added in rank order; tensor-parallel ranks compute the same numbers, and one counts."""
        own = torch.tensor([0.0 if self._mesh.tp.rank else value for value in sums.values()], dtype=torch.float64)
        total = torch.stack(self._mesh.world.all_gather(own)).sum(dim=0)
        return dict(zip(sums, total.tolist(), strict=True))

    def _exported(self) -> ExportedWeights:
        weights = {name: tensor.detach() for name, tensor in self._policy.weights.items()}
        return ExportedWeights(weights, self.config, self.options.layout, self._shard, self._mesh)

    def _models_of_part(self, part: str) -> list[_Model]:
        if part == "weights":
            return [self._policy]
        return list(self._frozen.values()) if part == "reference" else []

    def _tensors_of_part(self, part: str) -> list[Tensor]:
        """The flat tensors of a part, the draft's among them. The teacher is frozen like the reference and goes with it."""
        draft = self._draft
        buffers = [*self._buffers, *([draft.buffer] if draft is not None else [])]
        if part == "weights":
            return [buffer.weights for buffer in buffers]
        if part == "gradients":
            return [buffer.gradients for buffer in buffers]
        if part == "optimizer":
            states = [self._optimizer, *([draft.optimizer] if draft is not None else [])]
            return [tensor for state in states for tensor in state.tensors().values()]
        teacher = self._frozen.get("teacher")
        return [*self._reference_flats, *(teacher.weights.values() if teacher is not None else ())]

    def _need_resident(self, *parts: Part) -> None:
        for part in parts:
            if self._host.is_parked(part) or any(
                not tensor.untyped_storage().nbytes() for tensor in self._tensors_of_part(part)
            ):
                raise EngineError(f"train engine: its {part} are offloaded; onload them first")

    def _state(self) -> dict[str, Tensor]:
        reference = {
            f"buffer{index}.reference": flat[buffer.chunk]
            for index, (buffer, flat) in enumerate(zip(self._buffers, self._reference_flats, strict=False))
        }
        draft = self._draft.state() if self._draft is not None else {}
        steps_taken = torch.tensor(self._optimizer.steps_taken)
        return {**self._optimizer.tensors(), **reference, **draft, "steps_taken": steps_taken}

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must have been written with to fit this rank."""
        return {
            "model": hashlib.sha256(repr(self.config).encode()).hexdigest()[:16],
            "dtype": self.options.dtype,
            "layout": repr(self.options.layout),
            "rank": str(self._mesh.rank),
        }


def _buffers(found: Sequence[Parameter], mesh: Mesh, dtype: torch.dtype, device: str) -> tuple[ParameterBuffer, ...]:
    """One buffer for the dense weights and one for the experts, where there are any: their replicas are other ranks."""
    groups = (
        (mesh.dp, [each for each in found if not each.is_expert]),
        (mesh.expert_dp, [each for each in found if each.is_expert]),
    )
    return tuple(
        ParameterBuffer([_buffered(each, mesh) for each in members], group, dtype=dtype, device=device)
        for group, members in groups
        if members
    )


def _buffered(parameter: Parameter, mesh: Mesh) -> BufferedParameter:
    sharded = any(piece.sharded for piece in parameter.pieces)
    return BufferedParameter(
        name=parameter.name,
        shape=parameter.shape,
        counted=sharded or mesh.tp.rank == 0,
        decayed=len(parameter.shape) > 1,
    )


def _shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _merged(parts: Iterator[dict[str, Tensor]]) -> Weights:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _known(parts: Sequence[str]) -> Sequence[str]:
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"a train engine can offload {', '.join(_PARTS)}, not '{part}'")
    return parts
