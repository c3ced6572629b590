"""Give a tensor's memory back and take it again, while the tensor and all that refer to it stay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def free_storage(tensors: Iterable[Tensor]) -> None:
    """Release the memory behind each tensor; its contents are lost and it must not be read until it is restored."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def restore_storage(tensors: Iterable[Tensor]) -> None:
    """Take the memory again where it was released; contents are undefined. Tensors must own their whole storage."""
    for tensor in tensors:
        if not tensor.untyped_storage().nbytes():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind the tensors now, each storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
