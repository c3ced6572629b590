"""A checkpoint is whole or not there, whatever fails while it is written; and whatever is changed afterwards is noticed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.backends.executor.checkpoints import (
    Manifest,
    all_checkpoints,
    checkpoint_name,
    commit,
    keep_newest,
    newest_good,
    open_writing,
    record_files,
    sweep,
)

PLAN = "a" * 64


def manifest(version: int, files: tuple[Any, ...]) -> Manifest:
    return Manifest(
        plan_sha256=PLAN,
        loop="rl",
        iteration=version,
        weight_version=version,
        done={"train": version},
        cursors={f"prompts@{version}": 4 * version},
        weights_made={f"train@{version}": version},
        older_weights={},
        metrics=[{"loop": "rl", "iteration": version}],
        journal_row=version,
        seed=0,
        files=files,
    )


def write(checkpoints: Path, version: int, content: bytes = b"weights") -> Path:
    folder = open_writing(checkpoints, version)
    (folder / "below").mkdir()
    (folder / "rank_00000.safetensors").write_bytes(content + bytes([version]))
    (folder / "below" / "bucket.bin").write_bytes(b"older")
    return commit(folder, manifest(version, record_files(folder, ["rank_00000.safetensors", "below/bucket.bin"])))


def test_what_is_written_is_found_newest_first(tmp_path: Path) -> None:
    for version in (3, 12, 7):
        write(tmp_path, version)
    folder, found, refusals = newest_good(tmp_path, PLAN)
    assert folder == tmp_path / checkpoint_name(12)
    assert found is not None
    assert found.weight_version == 12
    assert found.cursors == {"prompts@12": 48}
    assert not refusals


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for version in range(1, 5):
        write(tmp_path, version)
    assert keep_newest(tmp_path, 2) == ["step-000002", "step-000001"]
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-000004", "step-000003"]
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4, b"first")
    write(tmp_path, 4, b"again")
    folder, _, refusals = newest_good(tmp_path, PLAN)
    assert folder is not None
    assert (folder / "rank_00000.safetensors").read_bytes().startswith(b"again")
    assert not refusals


class FailingDisk:
    """Counts calls that touch the disk and fails the one of a given number, as a full disk or a power cut would."""

    CALLS = ("fsync", "replace", "rename", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.count, self.fail_at = 0, fail_at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return call


def failing_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A first checkpoint, then a second whose n-th call to the disk fails, for n = 1, 2, ... until none fails."""
    for fail_at in range(1, 200):
        checkpoints = tmp_path / str(fail_at)
        write(checkpoints, 1)
        with monkeypatch.context() as patched:
            disk = FailingDisk(patched, fail_at)
            with contextlib.suppress(OSError):
                write(checkpoints, 2)
        yield checkpoints, disk.count < fail_at
        if disk.count < fail_at:
            return


def test_a_write_that_fails_at_any_call_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = []
    for checkpoints, whole in failing_writes(monkeypatch, tmp_path):
        _, found, refusals = newest_good(checkpoints, PLAN)
        assert found is not None
        assert not refusals
        versions.append(found.weight_version)
        assert whole or found.weight_version in (1, 2)
        sweep(checkpoints)
        assert not list(checkpoints.glob(".writing-*"))
    assert versions[-1] == 2
    assert versions.count(1) > 8, "the failures before the rename must leave the older one"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed_and_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    checkpoints = tmp_path_factory.mktemp("flip")
    write(checkpoints, 1)
    newest = write(checkpoints, 2)
    _, original, _ = newest_good(checkpoints, PLAN)
    victim = data.draw(st.sampled_from(sorted(path for path in newest.rglob("*") if path.is_file())))
    content = bytearray(victim.read_bytes())
    change = data.draw(st.sampled_from(["flip", "cut", "grow", "remove"]))
    if change == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif change == "grow":
        content += b"\0"
    victim.write_bytes(content) if change != "remove" else victim.unlink()
    folder, found, refusals = newest_good(checkpoints, PLAN)
    if victim.name == "manifest.json" and not refusals:  # white space
        assert found == original
        return
    assert folder == checkpoints / checkpoint_name(1)
    assert [refusal.path.name for refusal in refusals] == [victim.name]


def test_a_manifest_that_still_reads_but_says_something_else_is_noticed(tmp_path: Path) -> None:
    manifest_file = write(tmp_path, 2) / "manifest.json"
    manifest_file.write_text(manifest_file.read_text().replace('"prompts@2": 8', '"prompts@2": 9'))
    assert "changed after it was written" in newest_good(tmp_path, PLAN)[2][0].reason


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5)
    folder, found, refusals = newest_good(tmp_path, "b" * 64)
    assert folder is None
    assert found is None
    assert "of another plan" in refusals[0].reason


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    one, other = write(tmp_path, 1), write(tmp_path, 2)
    name = "rank_00000.safetensors"
    first, second = (one / name).read_bytes(), (other / name).read_bytes()
    (one / name).write_bytes(second)
    (other / name).write_bytes(first)
    assert newest_good(tmp_path, PLAN)[0] is None


def test_sweeping_removes_what_was_half_written_or_half_deleted(tmp_path: Path) -> None:
    write(tmp_path, 1)
    open_writing(tmp_path, 2)
    (tmp_path / ".discarded-step-000000").mkdir()
    assert sweep(tmp_path) == [".discarded-step-000000", ".writing-step-000002"]
    assert newest_good(tmp_path, PLAN)[1] is not None
