"""The trainer's weights as full Hugging Face tensors, wherever their shards lie: to rollout engines, to a hash, to disk.

Each tensor has one owner: the first tensor-parallel rank of its pipeline stage and, for an expert, of its expert-parallel
rank, in the first replica. All functions are collective: every rank of the trainer calls them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket
from miles_plan.backends.torch_engine.agreement import raise_together
from miles_plan.backends.torch_engine.mesh import Mesh, stage_layers
from miles_plan.backends.torch_engine.weights import Shard, Weights, full_names, gather_full_tensors, parameters
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.backends.training.exported_checkpoint import digest, digest_of_model, make_aside, write_aside
from miles_plan.backends.weight_transport.shared_memory import SharedMemoryWriter, plan_buckets
from miles_plan.ir.layout import TrainLayout


@dataclass(frozen=True, slots=True, eq=False)
class ExportedWeights:
    """One rank's share of a trainer's weights, and what it takes to see them whole."""

    weights: Weights
    config: DecoderConfig
    layout: TrainLayout
    shard: Shard
    mesh: Mesh

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, in which weights are exported."""
        return next(iter(self.weights.values())).dtype

    def owners(self) -> dict[str, int]:
        """World rank of each tensor's owner, in model order; a pure function of model and layout."""
        found = {}
        stages = stage_layers(self.layout, self.config.num_layers)
        for stage, layers in enumerate(stages):
            ends = {"first_stage": stage == 0, "last_stage": stage == len(stages) - 1}
            for ep_rank in range(self.layout.ep):
                shard = Shard(ep_rank=ep_rank, ep=self.layout.ep, layers=layers, **ends)
                owner = self.layout.tp * (ep_rank + self.layout.dp * stage)
                for parameter in parameters(self.config, shard):
                    if parameter.is_expert or ep_rank == 0:
                        found.update({piece.name: owner for piece in parameter.pieces})
        return {name: found[name] for name in full_names(self.config)}

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The full tensors that this rank's tensor-parallel group owns, in model order, on all its ranks."""
        if self.mesh.expert_dp.rank:  # another replica owns what this rank holds: spare its group the gathering
            return
        owners, first = self.owners(), self.mesh.tp.global_ranks[0]
        for name, tensor in gather_full_tensors(self.weights, self.config, self.shard, self.mesh):
            if owners[name] == first:
                yield name, tensor

    def publish(
        self, writer: SharedMemoryWriter, version: int, bucket_bytes: int, draft: Mapping[str, Tensor]
    ) -> Iterator[WeightBucket]:
        """Write the buckets that this rank owns, one at a time; every rank must run the iterator to its end.

        draft: tensors that every rank holds whole; the first rank sends them after its own.
        """
        element_bytes = torch.empty(0, dtype=self.dtype).element_size()
        sizes = {name: torch.Size(shape).numel() * element_bytes for name, shape in full_names(self.config).items()}
        sizes |= {name: tensor.nbytes for name, tensor in draft.items()}
        owners = self.owners() | dict.fromkeys(draft, 0)
        tensors = chain(self.own_tensors(), draft.items())
        for plan in plan_buckets(sizes, owners, bucket_bytes):
            if plan.owner != self.mesh.tp.global_ranks[0]:
                continue
            content = [next(tensors) for _ in plan.names]
            if self.mesh.tp.rank == 0:
                yield writer.write(version, plan, content)

    def sha256(self) -> str:
        """SHA-256 over all tensors by name, the same for every layout: of each name, dtype, shape and bytes, in model order."""
        names = full_names(self.config)
        digests = {name: digest(tensor) for name, tensor in self.own_tensors() if self.mesh.tp.rank == 0}
        table = torch.zeros(len(names), hashlib.sha256().digest_size, dtype=torch.int32)
        for row, name in enumerate(names):
            if name in digests:
                table[row] = torch.tensor(list(digests[name]), dtype=torch.int32)
        table = self.mesh.world.all_reduce_sum(table)  # every digest has one owner
        return digest_of_model(names, self.dtype, {name: bytes(table[row].tolist()) for row, name in enumerate(names)})

    def write_checkpoint(self, directory: Path, source: Path) -> list[str]:
        """A checkpoint that transformers loads: these weights, with config and tokenizer files from `source`.

        Rank 0 writes, one tensor in memory at a time, into a directory that must not exist yet and appears when it is whole.
        Returns the file names on rank 0, nothing on others. EngineError names a path that cannot be written.
        """
        aside, error = None, None
        if self.mesh.world.rank == 0:
            try:
                aside = make_aside(directory)
            except EngineError as caught:
                error = caught
        raise_together(error, self.mesh.world, f"writing the checkpoint {directory}")
        if aside is not None:
            dtype = str(self.dtype).removeprefix("torch.")
            return write_aside(aside, directory, source, self._all_tensors(), dtype)
        for _, tensor in self.own_tensors():
            if self.mesh.tp.rank == 0:
                self.mesh.world.send(tensor.cpu(), 0)
        return []

    def _all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Rank 0 sees every tensor in model order, its own and those that their owners send."""
        own = self.own_tensors()
        owners = self.owners()
        for name, shape in full_names(self.config).items():
            if owners[name] == 0:
                yield next(own)
            else:
                yield name, self.mesh.world.receive(torch.empty(shape, dtype=self.dtype), owners[name])
