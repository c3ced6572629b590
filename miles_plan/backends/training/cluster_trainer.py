"""What Megatron's and FSDP2's trainers share: parts that leave the device and come back, and weights that are published."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from miles_plan.backends.engine import BucketLayout, DeviceBucket, EngineError, MemoryReport, Part, WeightBucket, WhichModel
from miles_plan.backends.training.host_store import HostStore
from miles_plan.backends.training.storage import free_storage, resident_bytes, restore_storage
from miles_plan.backends.weight_transport.publisher import WeightPublisher
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.options import OptimizerOptions

PARTS = ("weights", "gradients", "optimizer", "reference")


class TrainerOptions(Protocol):
    """What is read here of an engine's options."""

    @property
    def model_directory(self) -> Path:
        """Where the first weights came from."""
        ...

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        ...

    @property
    def optimizer_offload(self) -> bool:
        """Whether masters and moments are on the device only while they are used."""
        ...

    @property
    def reference_offload(self) -> bool:
        """Whether frozen models are on the device only while they score."""
        ...


class ClusterTrainer(ABC):
    """One rank's parts and their publication; what computes is the engine's own.

    An engine sets the attributes below before it calls anything here, and says which tensors a part consists of.
    """

    engine: ClassVar[str]
    options: TrainerOptions
    _host: HostStore
    _publisher: WeightPublisher

    @abstractmethod
    def _tensors_of_part(self, part: str) -> list[Tensor]:
        """The tensors behind a part. The teacher is frozen like the reference and goes with it."""

    @abstractmethod
    def _model(self, which: WhichModel) -> object:
        """A model that the engine holds. EngineError names the option that would make it hold one."""

    @abstractmethod
    def _copy_to_reference(self) -> None:
        """Overwrite the reference with the policy."""

    def draft_step(self, batch: SampleBatch, *, optimizer: OptimizerOptions) -> Mapping[str, float]:
        """EngineError: this trainer holds no speculative draft."""
        raise EngineError(f"{self.engine} train engine: it holds no draft; train a draft with the torch engine")

    def snapshot_reference(self) -> None:
        """From now on the reference model is the policy as it is. EngineError without `keep_reference`."""
        self._model("reference")
        self._need_resident("weights")
        with self._frozen_at_hand():
            self._copy_to_reference()

    def weight_layout(self, *, bucket_bytes: int) -> tuple[BucketLayout, ...]:
        """The buckets that `stream_weights` gives; see `DeviceWeightSource`."""
        return self._publisher.layout(bucket_bytes)

    def stream_weights(self, version: int, *, bucket_bytes: int) -> Iterator[DeviceBucket]:
        """The weights in device memory; see `DeviceWeightSource`. EngineError while they are offloaded."""
        self._need_resident("weights")
        yield from self._publisher.stream(bucket_bytes)

    def export_weights(self, version: int, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Publish the weights in shared memory: rank 0 yields, and every rank must run it to its end."""
        self._need_resident("weights")
        yield from self._publisher.publish(version, bucket_bytes)

    def release_weights(self, version: int) -> None:
        """Remove the shared memory of that version."""
        self._publisher.release(version)

    def export_checkpoint(self, directory: Path) -> list[str]:
        """Write a Hugging Face checkpoint of the policy; collective. Returns the file names on rank 0, nothing on others."""
        self._need_resident("weights")
        return self._publisher.write_checkpoint(directory, self.options.model_directory)

    def weights_sha256(self) -> str:
        """SHA-256 over the policy's full tensors, the same on every rank and for every layout; collective."""
        self._need_resident("weights")
        return self._publisher.sha256()

    def offload(self, parts: Sequence[Part]) -> MemoryReport:
        """Park parts in pinned memory (CPU: in files); gradients are dropped. The device's memory is free when it returns."""
        for part in _known(parts):
            if part == "gradients":
                free_storage(self._tensors_of_part(part))
            else:
                self._host.offload(part, self._tensors_of_part(part))
        if self.options.device == "cuda":
            torch.cuda.empty_cache()
        return self.memory()

    def onload(self, parts: Sequence[Part]) -> MemoryReport:
        """Bring parts back bit for bit; a no-op for what is resident."""
        for part in _known(parts):
            if part == "gradients":
                restore_storage(self._tensors_of_part(part))
            else:
                self._host.onload(part)
        return self.memory()

    def memory(self) -> MemoryReport:
        """Bytes by part, of this rank's shares."""
        device = {part: resident_bytes(self._tensors_of_part(part)) for part in PARTS}
        return MemoryReport(device_bytes=device, host_bytes=self._host.host_bytes)

    def _free(self) -> None:
        self._publisher.close()
        self._host.close()
        for part in PARTS:
            free_storage(self._tensors_of_part(part))

    def _frozen_at_hand(self) -> AbstractContextManager[None]:
        """The reference and the teacher on the device: for this while only where the options say so, else as they must be."""
        return self._at_hand("reference", self.options.reference_offload and bool(self._tensors_of_part("reference")))

    def _optimizer_at_hand(self) -> AbstractContextManager[None]:
        """Moments and masters on the device: for this while only where they live on the host, else as they must be."""
        return self._at_hand("optimizer", self.options.optimizer_offload)

    @contextmanager
    def _at_hand(self, part: Part, for_this_while: bool) -> Iterator[None]:
        if not for_this_while:
            self._need_resident(part)
            yield
            return
        self.onload([part])
        try:
            yield
        finally:
            self.offload([part])

    def _need_resident(self, *parts: str) -> None:
        """EngineError for a part that is offloaded; an optimizer that lives on the host comes when it is used."""
        for part in parts:
            if part == "optimizer" and self.options.optimizer_offload:
                continue
            if self._host.is_parked(part) or any(
                tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in self._tensors_of_part(part)
            ):
                raise EngineError(f"train engine: its {part} are offloaded; onload them first")


def _known(parts: Sequence[str]) -> Sequence[str]:
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"a train engine can offload {', '.join(PARTS)}, not '{part}'")
    return parts
