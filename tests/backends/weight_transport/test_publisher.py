from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.exported_checkpoint import digest, digest_of_model
from miles_plan.backends.weight_transport.publisher import FullTensor, WeightPublisher
from miles_plan.backends.weight_transport.shared_memory import read_bucket

TENSORS = {f"layer.{index}.weight": torch.randn(3 + index, 5).bfloat16() for index in range(6)}


def publisher() -> WeightPublisher:
    def fill(flat: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        assert not flat.any()  # zeroed before every gather
        for name, view in views.items():
            view.copy_(TENSORS[name])

    specs = {name: FullTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    return WeightPublisher(specs, fill, "cpu")


@pytest.mark.parametrize("bucket_bytes", [1, 150, 1 << 20])
def test_buckets_hold_every_tensor_once_aligned_and_bounded(bucket_bytes):
    layouts = publisher().layout(bucket_bytes)
    places = [each for layout in layouts for each in layout.tensors]
    assert [each.name for each in places] == list(TENSORS)
    assert [layout.last for layout in layouts] == [False] * (len(layouts) - 1) + [True]
    for layout in layouts:
        assert len(layout.tensors) == 1 or layout.size_bytes <= bucket_bytes
        assert all(each.offset_bytes % 64 == 0 for each in layout.tensors)


def test_a_stream_is_the_layout_with_bytes_in_it():
    found, staging = {}, set()
    for bucket in publisher().stream(150):
        staging.add(bucket.data.untyped_storage().data_ptr())
        for each in bucket.layout.tensors:
            raw = bucket.data[each.offset_bytes : each.offset_bytes + each.size_bytes]
            found[each.name] = raw.clone().view(torch.bfloat16).view(each.shape)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert len(staging) == 1


def test_shared_memory_carries_the_same_bytes():
    one = publisher()
    buckets = list(one.publish(3, 150))
    found = {name: tensor.clone() for bucket in buckets for name, tensor in read_bucket(bucket)}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    one.release(3)
    with pytest.raises(EngineError, match="cannot open"):
        list(read_bucket(buckets[0]))
    one.close()


def test_the_hash_is_of_names_shapes_and_bytes():
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    digests = {name: digest(tensor) for name, tensor in TENSORS.items()}
    assert publisher().sha256() == digest_of_model(shapes, torch.bfloat16, digests)


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "qwen3"}')
    (source / "tokenizer.json").write_text("{}")
    files = publisher().write_checkpoint(tmp_path / "out", source)
    assert set(files) == {"model.safetensors", "config.json", "tokenizer.json"}
    assert '"dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(EngineError, match="exists already"):
        publisher().write_checkpoint(tmp_path / "out", source)
