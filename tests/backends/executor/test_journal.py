"""The journal: what is done, what is taken back, what repeated work made the first time."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.backends.executor.dataflow import Instance
from miles_plan.backends.executor.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    found = Journal(tmp_path / "journal.sqlite")
    found.begin_session(1)
    return found


def complete(journal: Journal, task: str, iteration: int, digest: str) -> None:
    journal.complete(journal.start(Instance(task, iteration), "rl", 0), digest=digest, weight_version=iteration)


def test_completed_iterations_are_counted(journal: Journal) -> None:
    complete(journal, "train", 0, "a")
    complete(journal, "train", 1, "b")
    journal.start(Instance("train", 2), "rl", 0)
    assert journal.completed_iterations() == {"train": 2}


def test_what_a_checkpoint_does_not_hold_is_taken_back_with_its_digest_kept(journal: Journal) -> None:
    complete(journal, "train", 0, "a")
    complete(journal, "train", 1, "b")
    running = journal.start(Instance("rollout", 2), "rl", 0)
    assert journal.undo_after({"train": 1, "rollout": 1}) == 1
    assert journal.completed_iterations() == {"train": 1}
    assert journal.earlier_digest(Instance("train", 1)) == "b"
    assert journal.earlier_digest(Instance("train", 0)) is None
    (row,) = [row for row in journal.rows() if row.id == running]
    assert (row.status, row.error) == ("failed", "its process ended")


def test_it_can_be_read_while_it_is_written(journal: Journal, tmp_path: Path) -> None:
    complete(journal, "train", 0, "a")
    reader = Journal(tmp_path / "journal.sqlite", read_only=True)
    complete(journal, "train", 1, "b")
    assert [row.iteration for row in reader.rows(status="completed")] == [0, 1]
    reader.close()


def test_a_full_disk_is_an_error_that_names_the_journal(journal: Journal) -> None:
    journal.close()
    journal = Journal(journal.path)
    journal._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match=r"journal\.sqlite"):
        fill(journal)


def fill(journal: Journal) -> None:
    for iteration in range(200):
        journal.start(Instance("train", iteration), "rl", 0)


def test_killed_sessions_count_to_their_last_sign_of_life(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal.sqlite")
    first.begin_session(1)
    complete(first, "train", 0, "a")
    first.close()
    second = Journal(tmp_path / "journal.sqlite")
    second.begin_session(2)
    second.end_session("finished")
    assert [session[3] for session in second.sessions()] == [None, "finished"]
    assert 0.0 <= second.seconds_so_far() < 5.0
