"""One run at a time in a folder; the lock says who holds it and cannot outlive its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miles_plan.backends.executor.run_directory import RunDirectory, RunDirectoryError

HOLDER = """
import sys, time
from pathlib import Path
from miles_plan.backends.executor.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
with directory.locked():
    directory.write_owner({"belongings": {"marker": "m"}})
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.make()
    return found


def hold(directory: RunDirectory) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_owner_named(directory: RunDirectory) -> None:
    process = hold(directory)
    try:
        with pytest.raises(RunDirectoryError, match=f"in use by process {process.pid} on "), directory.locked():
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_leaves_its_belongings_and_no_lock(directory: RunDirectory) -> None:
    process = hold(directory)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with directory.locked() as left_behind:
        assert left_behind is not None
        assert left_behind["pid"] == process.pid
        assert left_behind["belongings"] == {"marker": "m"}


def test_a_clean_end_leaves_nothing(directory: RunDirectory) -> None:
    with directory.locked() as left_behind:
        assert left_behind is None
    with directory.locked() as left_behind:
        assert left_behind is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunDirectory(tmp_path / "file" / "run").make()
