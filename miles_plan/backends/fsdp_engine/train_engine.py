"""The FSDP2 trainer: one rank of the transformers implementation of a model, every tensor sharded over all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from miles_plan.backends.fsdp_engine.full_weights import fill_full, full_tensors
from miles_plan.backends.fsdp_engine.model import PackedBounds, ShardedModel, build, local
from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.fsdp_engine.routing import ReplayedRouters
from miles_plan.backends.fsdp_engine.sharded_adam import ShardedAdam
from miles_plan.backends.training.agreement import open_process_group, raise_together
from miles_plan.backends.training.batch_loss import BatchLoss, missing_columns
from miles_plan.backends.training.cluster_trainer import ClusterTrainer
from miles_plan.backends.training.device_allocator import use_expandable_segments
from miles_plan.backends.training.host_store import HostStore
from miles_plan.backends.training.micro_batches import micro_batches_of_rank
from miles_plan.backends.training.packed_samples import (
    PackedSamples,
    batch_problems,
    on_device,
    pack_samples,
    predicting_nothing,
)
from miles_plan.backends.training.scores import VocabParallelScores
from miles_plan.backends.training.state_files import check_state, read_state, write_state
from miles_plan.backends.weight_transport.publisher import WeightPublisher
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import LossOptions, OptimizerOptions

Scored = Callable[[PackedSamples, Tensor, Tensor], Tensor]


class FsdpTrainEngine(ClusterTrainer):
    """One rank of an FSDP2 trainer; a `TrainEngine` and a `DeviceWeightSource`.

    Every rank is made with the same options and rendezvous and takes the same calls. A process group that exists already is
    used and left alone; else the engine starts one and ends it. ValueError for options or a model that cannot be trained.
    """

    engine = "fsdp"
    options: FsdpEngineOptions

    def __init__(self, options: FsdpEngineOptions, *, rank: int = 0, rendezvous: str | None = None) -> None:
        self.options, self.rank = options, rank
        self._owns_group = not dist.is_initialized()
        use_expandable_segments(options.device)
        open_process_group(options.layout.world_size, rank, rendezvous, device=options.device)
        torch.manual_seed(options.seed)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._policy = build(options.model_directory, dtype=self._dtype, device=options.device, recompute=options.recompute)
        self._routers = {"policy": ReplayedRouters(self._policy.routers)}
        self._optimizer = ShardedAdam(self._policy.parameters, options.device)
        self._reference = [local(each).clone() for each in self._policy.parameters.values()] if options.keep_reference else []
        self._teacher: ShardedModel | None = None
        if options.teacher_directory is not None:
            settings: dict[str, Any] = {"dtype": self._dtype, "device": options.device, "recompute": "none"}
            self._teacher = build(options.teacher_directory, trained=False, **settings)
            self._routers["teacher"] = ReplayedRouters(self._teacher.routers)
        self._host = HostStore(options.host_directory / f"rank_{rank:05d}")
        self._publisher = WeightPublisher(full_tensors(self._policy, self._dtype), self._fill, options.device)
        if options.optimizer_offload:
            self.offload(["optimizer"])
        if options.reference_offload and self._tensors_of_part("reference"):
            self.offload(["reference"])

    def log_probs(self, batch: SampleBatch, *, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        """Log-probs and entropies of this rank's share; see `TrainEngine`. EngineError for a batch the model cannot take."""
        self._model(model)
        self._need_resident("weights")
        if model == "policy":
            return self._log_probs(batch, model, temperature, replay_routing)
        with self._frozen_at_hand():
            return self._log_probs(batch, model, temperature, replay_routing)

    def _log_probs(self, batch: SampleBatch, model: WhichModel, temperature: float, replay_routing: bool) -> RankLogProbs:
        chosen = self._model(model)
        parts = self._pack(batch, chosen, replay_routing)
        parts.sort(key=lambda part: len(part.targets), reverse=True)  # the first logits leave room for all that follow
        routers = self._routers["teacher" if model == "teacher" else "policy"]
        routers.reset()
        found: list[Tensor] = []
        with torch.no_grad(), self._reference_weights(model == "reference"):
            for part in parts:
                found.append(torch.stack(self._scores(chosen, part, routers, temperature)))
        scored = torch.cat([*found, torch.zeros(2, 0, device=self.options.device)], dim=1).cpu().numpy()
        samples = [part.samples for part in parts]
        return RankLogProbs(
            sample_index=np.concatenate([*samples, np.zeros(0, dtype=np.int64)]),
            log_probs=scored[0],
            entropy=scored[1],
            routing_mismatches=routers.mismatches,
            routing_compared=routers.compared,
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
        parts = self._pack(batch, self._policy, replay_routing)
        batch_loss = BatchLoss(batch, loss)
        names, routers = list(batch_loss.metrics_of_nothing()), self._routers["policy"]
        if not batch_loss.num_tokens:
            return {**dict.fromkeys(names, 0.0), "tokens": 0.0, **self._optimizer.skip(optimizer)}
        sums = torch.zeros(len(names), dtype=torch.float32, device=self.options.device)
        routers.reset()
        self._optimizer.begin()
        for part in parts:
            log_probs, entropy = self._scores(self._policy, part, routers, temperature)
            value, metrics = batch_loss.of(part, log_probs, entropy)
            sums.add_(torch.stack([metrics[name].detach().float() for name in names]))
            torch.autograd.backward(value)
        found = dict(zip(names, sums.tolist(), strict=True))
        if replay_routing:
            found |= {"routing_mismatches": routers.mismatches, "routing_compared": routers.compared}
        with self._optimizer_at_hand():
            metrics_of_step = self._optimizer.step(optimizer)
        return {**self._sum_over_ranks(found), "tokens": float(batch_loss.num_tokens), **metrics_of_step}

    def _copy_to_reference(self) -> None:
        for copy, parameter in zip(self._reference, self._policy.parameters.values(), strict=True):
            copy.copy_(local(parameter))

    def save(self, directory: Path) -> Sequence[str]:
        """Write masters, moments, counts, the reference and the generators in torch.distributed.checkpoint's format."""
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
        for name, parameter in self._policy.parameters.items():
            local(parameter).copy_(found[f"weights/{name}"])
        with self._frozen_at_hand():
            for index, copy in enumerate(self._reference):
                copy.copy_(found[f"reference/{index}"])
        prefix = "optimizer/"
        moments = {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}
        with self._optimizer_at_hand():
            self._optimizer.restore(moments, int(found["steps_taken"]))
        torch.set_rng_state(found["generator/cpu"])
        if self.options.device == "cuda":
            torch.cuda.set_rng_state(found["generator/cuda"])

    def close(self) -> None:
        """Free everything; end the process group if this engine started it."""
        self._free()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _model(self, which: WhichModel) -> ShardedModel:
        if which == "policy" or (which == "reference" and self._reference):
            return self._policy
        if which == "teacher" and self._teacher is not None:
            return self._teacher
        option = "keep_reference" if which == "reference" else "teacher_directory"
        raise EngineError(f"train engine: it holds no {which} model; set {option}")

    def _pack(self, batch: SampleBatch, model: ShardedModel, replay_routing: bool) -> list[PackedSamples]:
        """This rank's micro-batches; every rank gathers weights in every one, so all run equally many."""
        if problems := list(batch_problems(batch, model, replay_routing=replay_routing)):
            raise EngineError("train engine: " + "; ".join(problems))
        answered = np.flatnonzero(batch.response_length > 0)
        shares = micro_batches_of_rank(
            batch.length[answered] - 1,
            rank=self.rank,
            ranks=self.options.layout.dp,
            budget_tokens=self.options.micro_batch_tokens,
            lockstep=True,
        )
        parts = []
        for share in shares:
            samples = answered[share] if len(share) else answered[[int(np.argmin(batch.length[answered]))]]
            part = pack_samples(batch, samples, replay_routing=replay_routing, device=self.options.device, buckets=False)
            parts.append(part if len(share) else predicting_nothing(part))
        return parts

    def _scores(
        self, model: ShardedModel, part: PackedSamples, routers: ReplayedRouters, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies at the response tokens, float32 [r]; logits exist of no other rows."""
        rows = np.concatenate([[0], np.cumsum(part.sequences.lengths)])
        routers.begin(part.replay)
        output = model.module(
            input_ids=part.tokens[None],
            position_ids=part.sequences.positions[None],
            logits_to_keep=part.predicting,
            use_cache=False,
            bounds=PackedBounds(tuple(rows.tolist()), on_device(rows.astype(np.int32), self.options.device)),
        )
        routers.end()
        scores: Any = VocabParallelScores
        log_probs, entropy = scores.apply(output.logits[0], part.targets, 0, model.vocab_size, temperature or 1.0, None)
        return log_probs, entropy

    @contextmanager
    def _reference_weights(self, wanted: bool) -> Iterator[None]:
        """While it lasts, the policy's shards hold the reference and the other way round; one tensor at a time is copied."""
        if wanted:
            self._swap()
        try:
            yield
        finally:
            if wanted:
                self._swap()

    def _swap(self) -> None:
        for copy, parameter in zip(self._reference, self._policy.parameters.values(), strict=True):
            shard = local(parameter)
            held = shard.clone()
            shard.copy_(copy)
            copy.copy_(held)

    def _fill(self, flat: Tensor, views: Mapping[str, Tensor]) -> None:
        fill_full(views, self._policy)

    def _sum_over_ranks(self, sums: Mapping[str, float]) -> dict[str, float]:
        total = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.options.device)
        dist.all_reduce(total)
        return dict(zip(sums, total.tolist(), strict=True))

    def _tensors_of_part(self, part: str) -> list[Tensor]:
        """The tensors behind a part. The teacher is frozen like the reference and goes with it."""
        if part == "weights":
            return [local(parameter) for parameter in self._policy.parameters.values()]
        if part == "gradients":
            return self._optimizer.gradients()
        if part == "optimizer":
            return list(self._optimizer.moments().values())
        teacher = self._teacher.parameters.values() if self._teacher is not None else ()
        return [*self._reference, *(local(parameter) for parameter in teacher)]

    def _state(self) -> dict[str, Tensor]:
        weights = {f"weights/{name}": local(parameter) for name, parameter in self._policy.parameters.items()}
        moments = {f"optimizer/{name}": tensor for name, tensor in self._optimizer.moments().items()}
        reference = {f"reference/{index}": tensor for index, tensor in enumerate(self._reference)}
        generators = {"generator/cpu": torch.get_rng_state()}
        if self.options.device == "cuda":
            generators["generator/cuda"] = torch.cuda.get_rng_state()
        return {**weights, **moments, **reference, **generators, "steps_taken": self._optimizer.step_counts()}

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must have been written with to fit this rank."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._policy.parameters.items()}
        return {
            "model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "dtype": self.options.dtype,
            "layout": repr(self.options.layout),
            "rank": str(self.rank),
        }
