"""Weights from a trainer's memory into the engine beside it: order, versions, and what happens when something does not match.

The tensors are on the CPU here, so a bucket cannot be lent to another process: `lent` hands the bytes on directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from miles_plan.backends.engine import BucketLayout, DeviceBucket, EngineError, WeightBucket, WeightTensor
from miles_plan.backends.executor.actors import Calls
from miles_plan.backends.executor.driver import Running
from miles_plan.backends.executor.engines import RolloutRank, TrainRank
from miles_plan.backends.executor.operations import deliver
from miles_plan.backends.executor.operations.deliver import confirm, hand_over, probes_of_bucket, receive_weights
from miles_plan.backends.executor.operations.operation import Wait
from miles_plan.backends.weight_transport.cuda_ipc import view_of


def layout(index: int, name: str, *, last: bool) -> BucketLayout:
    tensor = WeightTensor(name=name, shape=(4, 8), dtype="float32", offset_bytes=0, size_bytes=128, checksum="")
    return BucketLayout(index=index, tensors=(tensor,), last=last)


LAYOUTS = (layout(0, "a.weight", last=False), layout(1, "b.weight", last=True))


class Trainer:
    """Two buckets, both in one staging buffer that the next one overwrites."""

    def weight_layout(self, *, bucket_bytes: int) -> tuple[BucketLayout, ...]:
        return LAYOUTS

    def stream_weights(self, version: int, *, bucket_bytes: int) -> Iterator[DeviceBucket]:
        staging = torch.zeros(128, dtype=torch.uint8)
        for each in LAYOUTS:
            staging.view(torch.float32).copy_(torch.arange(32) + 100.0 * version + each.index)
            yield DeviceBucket(layout=each, data=staging)


@dataclass
class Engine:
    """Keeps what it is given; `spoil` changes it on the way in."""

    spoil: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    taken: list[tuple[int, int]] = field(default_factory=list)
    served: int | None = None

    def update_weights(self, bucket: Any) -> None:
        self.taken.append((bucket.version, bucket.index))
        for tensor in bucket.tensors:
            if bucket.handle is not None and not isinstance(bucket.handle, str):
                self.weights[tensor.name] = view_of(bucket.handle, tensor).clone() + self.spoil

    def probe(self, probes: list[dict[str, Any]]) -> list[str]:
        return [
            each["name"] for each in probes if float(self.weights[each["name"]][each["row"], each["column"]]) != each["value"]
        ]

    def commit_weights(self, version: int) -> int:
        self.served = version
        return version


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_on(bucket_layout: BucketLayout, data: Any, version: int) -> WeightBucket:
        return WeightBucket(
            transport="cuda_ipc",
            version=version,
            index=bucket_layout.index,
            handle=data,
            tensors=bucket_layout.tensors,
            last=bucket_layout.last,
        )

    monkeypatch.setattr(deliver, "lent_bucket", hand_on)


def ranks(engine: Engine, rank: int = 0) -> tuple[TrainRank, RolloutRank]:
    return TrainRank(Trainer(), rank, version=3), RolloutRank(engine, 0, 1, rank, version=2)  # type: ignore[arg-type]


@pytest.mark.usefixtures("lent")
def test_every_bucket_is_taken_before_the_next_overwrites_it() -> None:
    engine = Engine()
    train, rollout = ranks(engine)
    report = hand_over(train, rollout, 3, 128)
    assert engine.taken == [(3, 0), (3, 1)]
    assert [float(tensor[0, 0]) for tensor in engine.weights.values()] == [300.0, 301.0]
    assert rollout.version == engine.served == report["acknowledged"] == 3
    assert (report["bytes"], report["buckets"]) == (256, 2)
    assert report["probes"] > 0


@pytest.mark.usefixtures("lent")
def test_weights_that_arrive_changed_are_never_served() -> None:
    engine = Engine(spoil=1.0)
    train, rollout = ranks(engine)
    with pytest.raises(EngineError, match="version 3 arrived changed"):
        hand_over(train, rollout, 3, 128)
    assert rollout.version is None
    assert engine.served is None


@pytest.mark.usefixtures("lent")
def test_only_the_first_rank_of_an_engine_takes_buckets_and_all_acknowledge() -> None:
    engine = Engine()
    train, rollout = ranks(engine, rank=1)
    assert hand_over(train, rollout, 3, 128)["acknowledged"] == 3
    assert engine.taken == []
    assert rollout.version == 3


@pytest.mark.usefixtures("lent")
def test_a_trainer_rank_without_an_engine_streams_along() -> None:
    train, _ = ranks(Engine())
    assert hand_over(train, None, 3, 128) == {"bytes": 256, "buckets": 2, "probes": 0}


@pytest.mark.usefixtures("lent")
def test_a_trainer_that_holds_another_version_sends_nothing() -> None:
    engine = Engine()
    train, rollout = ranks(engine)
    with pytest.raises(EngineError, match="holds weights version 3, version 4"):
        hand_over(train, rollout, 4, 128)
    assert engine.taken == []


def test_what_is_received_is_served_only_after_it_was_looked_at() -> None:
    engine = Engine()
    _, rollout = ranks(engine)
    receive_weights(rollout, 3, LAYOUTS)
    assert engine.taken == [(3, 0), (3, 1)]
    assert rollout.version is None
    engine.weights = {each.tensors[0].name: torch.zeros(4, 8) for each in LAYOUTS}
    probe = {"name": "a.weight", "row": 1, "column": 2, "value": 0.0}
    assert confirm(rollout, 3, [probe]) == rollout.version == 3
    with pytest.raises(EngineError, match="arrived changed"):
        confirm(rollout, 4, [{**probe, "value": 1.0}])


def test_probes_of_two_versions_look_at_other_places() -> None:
    data = torch.arange(32, dtype=torch.float32).view(torch.uint8)
    places = [[(each["row"], each["column"]) for each in probes_of_bucket(LAYOUTS[0], data, version)] for version in (1, 2)]
    assert places[0] != places[1]
    for each in probes_of_bucket(LAYOUTS[0], data, 1):
        assert each["value"] == 8 * each["row"] + each["column"]


def test_of_calls_on_two_groups_each_report_has_its_owner() -> None:
    both = Calls("rollout", ("r0", "r1")).beside(Calls("train", ("t0",)))
    assert both.reports == ("r0", "r1", "t0")
    assert [both.owner(index) for index in range(3)] == ["rollout", "rollout", "train"]
    assert Calls("train", ("t0",)).owner(0) == "train"


def test_a_failure_is_put_down_to_the_group_whose_report_failed() -> None:
    running = Running("weight_sync@0", iter(()), 1.0)  # type: ignore[arg-type]
    running.wait = Wait("receive", Calls("rollout", ("r0",)).beside(Calls("train", ("t0",))))
    assert running.failed("died", "gone", 1).slot == "train"
    assert running.failed("died", "gone", 0).slot == "rollout"
