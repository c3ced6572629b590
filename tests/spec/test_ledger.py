from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from miles_plan.spec import LoadedJob, load_job
from miles_plan.spec.section import leaves
from tests.spec.example import VALID, write


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedJob:
    return load_job(write(tmp_path, VALID + "placement: {rollout_gpus: 4}\ntrain: {layout: {tp: 2}}\n"))


def test_a_read_leaf_has_its_readers_in_order(loaded: LoadedJob) -> None:
    with loaded.ledger.reading_as("lower_algorithm"):
        assert loaded.spec.algorithm.clip == 0.2
    with loaded.ledger.reading_as("schedule_steps"):
        assert loaded.spec.algorithm.clip == 0.2
        assert loaded.spec.algorithm.clip == 0.2
    assert loaded.ledger.readers("algorithm.clip") == ("lower_algorithm", "schedule_steps")


def test_the_innermost_reader_is_noted(loaded: LoadedJob) -> None:
    with loaded.ledger.reading_as("outer"), loaded.ledger.reading_as("inner"):
        _ = loaded.spec.seed
    assert loaded.ledger.readers("seed") == ("inner",)


def test_what_is_unread_is_told_in_spec_order(loaded: LoadedJob) -> None:
    before = loaded.ledger.unread()
    assert before[:3] == ("name", "seed", "model.name")
    assert "version" not in before, "the version is declared inert"
    with loaded.ledger.reading_as("pass"):
        _ = (loaded.spec.name, loaded.spec.model.name)
    assert set(before) - set(loaded.ledger.unread()) == {"name", "model.name"}


def test_reading_a_section_reads_none_of_its_leaves(loaded: LoadedJob) -> None:
    before = loaded.ledger.unread()
    with loaded.ledger.reading_as("pass"):
        _ = (loaded.spec.rollout, loaded.spec.train.layout, loaded.spec.placement)
    assert loaded.ledger.unread() == before


def test_leaves_inside_a_union_are_leaves(loaded: LoadedJob) -> None:
    assert {"placement.rollout_gpus", "train.layout.tp", "rollout.layout"} <= set(loaded.ledger.unread())
    assert "placement" not in loaded.ledger.unread()
    with loaded.ledger.reading_as("pass"):
        layout = loaded.spec.train.layout
        assert not isinstance(layout, str)
        assert layout.tp == 2
        assert loaded.spec.rollout.layout == "auto"
    assert not {"train.layout.tp", "rollout.layout"} & set(loaded.ledger.unread())


def test_items_of_a_list_are_counted_one_by_one(tmp_path: Path) -> None:
    spec = write(tmp_path, VALID.replace("{gpu: h200, nodes: 2}", "{groups: [{gpu: h200}, {gpu: h100}]}"))
    loaded = load_job(spec)
    with loaded.ledger.reading_as("pass"):
        _ = loaded.spec.cluster.groups[1].gpu
    unread = loaded.ledger.unread()
    assert "cluster.groups.0.gpu" in unread
    assert "cluster.groups.1.gpu" not in unread


def test_printing_hashing_comparing_and_dumping_are_no_use(loaded: LoadedJob) -> None:
    before = loaded.ledger.unread()
    with loaded.ledger.reading_as("pass"):
        _ = (repr(loaded.spec), loaded.resolved(), loaded.sha256(), loaded.spec == loaded.spec, hash(loaded.spec))
        _ = (list(leaves(loaded.spec)), loaded.spec.model_copy(deep=True), pickle.dumps(loaded.spec))
    assert loaded.ledger.unread() == before


def test_a_read_outside_any_reader_does_not_count(loaded: LoadedJob) -> None:
    assert loaded.spec.seed == 0
    assert loaded.ledger.readers("seed") == ()


def test_every_leaf_can_be_read(loaded: LoadedJob) -> None:
    """The ledger's paths are the spec's: reading every field of every section leaves nothing unread."""
    with loaded.ledger.reading_as("pass"):
        for path, _, _ in leaves(loaded.spec):
            value: object = loaded.spec
            for step in path.split("."):
                value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
    assert loaded.ledger.unread() == ()


def test_unknown_leaves_are_a_key_error(loaded: LoadedJob) -> None:
    with pytest.raises(KeyError):
        loaded.ledger.readers("rollout.temprature")


def test_copies_are_equal_and_specs_are_frozen(loaded: LoadedJob) -> None:
    assert copy.deepcopy(loaded.spec) == loaded.spec
    assert pickle.loads(pickle.dumps(loaded.spec)) == loaded.spec
    with pytest.raises(ValueError, match="frozen"):
        loaded.spec.seed = 3  # type: ignore[misc]
