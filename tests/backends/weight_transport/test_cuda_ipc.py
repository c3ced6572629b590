"""What of lending GPU memory can be looked at without a GPU: the checksums, the packing, and who may be lent."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.engine import WeightTensor
from miles_plan.backends.weight_transport import cuda_ipc
from miles_plan.backends.weight_transport.cuda_ipc import Nothing, checksums, lend, packed, view_of, with_checksums
from miles_plan.passes.sync_price import CHECKSUM_BYTES


def described(sizes: list[int]) -> list[WeightTensor]:
    """Byte tensors one after another, each at a multiple of 64."""
    found, offset = [], 0
    for index, size in enumerate(sizes):
        found.append(
            WeightTensor(name=f"w{index}", shape=(size,), dtype="uint8", offset_bytes=offset, size_bytes=size, checksum="")
        )
        offset += -(-size // 64) * 64
    return found


def bucket_of(tensors: list[WeightTensor], seed: int = 0) -> torch.Tensor:
    total = max(each.offset_bytes + -(-each.size_bytes // 64) * 64 for each in tensors)
    return torch.randint(0, 256, (total,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), where=st.integers(0), flip=st.integers(1, 255))
def test_a_byte_that_changed_changes_the_checksum_of_its_tensor_alone(sizes: list[int], where: int, flip: int) -> None:
    tensors = described(sizes)
    data = bucket_of(tensors)
    before = checksums(data, tensors)
    hit = where % len(tensors)
    data[tensors[hit].offset_bytes + where % sizes[hit]] ^= flip
    after = checksums(data, tensors)
    assert [index for index in range(len(tensors)) if before[index] != after[index]] == [hit]


def test_words_that_changed_places_change_the_checksum() -> None:
    (tensor,) = described([64])
    data = bucket_of([tensor])
    swapped = torch.cat([data[8:16], data[:8], data[16:]])
    assert checksums(data, [tensor]) != checksums(swapped, [tensor])


def test_a_checksum_does_not_depend_on_where_the_bucket_lies() -> None:
    tensors = described([100, 40])
    data = bucket_of(tensors)
    apart = [checksums(data[each.offset_bytes :], [replace(each, offset_bytes=0)])[0] for each in tensors]
    assert apart == checksums(data, tensors)
    assert [each.checksum for each in with_checksums(data, tensors)] == apart


def test_a_packed_bucket_has_no_gaps() -> None:
    tensors = described([100, 64])
    data = bucket_of(tensors)
    assert packed(data, tensors).tolist() == [*data[:100].tolist(), *data[128:192].tolist()]
    tight = described([64, 128])
    assert packed(bucket_of(tight), tight).data_ptr() != 0
    whole = bucket_of(tight)
    assert packed(whole, tight) is whole


def test_a_view_has_the_tensors_shape_and_type() -> None:
    tensor = WeightTensor(name="w", shape=(2, 3), dtype="bfloat16", offset_bytes=64, size_bytes=12, checksum="")
    data = torch.zeros(128, dtype=torch.uint8)
    data[64:76] = torch.arange(6, dtype=torch.bfloat16).view(torch.uint8)
    assert view_of(data, tensor).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_placeholder_is_loaded_without_torchs_own_loader() -> None:
    """Megatron-core replaces `torch.storage._load_from_bytes`, which a pickled CPU tensor names."""
    pickled = pickle.dumps([("description", Nothing())])
    assert b"_load_from_bytes" not in pickled
    ((_, tensor),) = pickle.loads(pickled)
    assert tensor.shape == (1,)


def test_only_what_lies_on_a_gpu_can_be_lent() -> None:
    with pytest.raises(ValueError, match="only CUDA tensors"):
        lend(torch.zeros(4))


def test_checksums_take_the_memory_that_the_plan_counts() -> None:
    """Words, their places and the products of both, of one chunk."""
    assert CHECKSUM_BYTES == 3 * 8 * cuda_ipc._CHUNK_WORDS
