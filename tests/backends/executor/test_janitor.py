"""When a driver dies, its janitor leaves nothing behind: no process, no folder, no shared memory."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_plan.backends.executor.janitor import (
    MARKER,
    SHARED_MEMORY,
    Belongings,
    clean_up,
    processes_of,
    remove_orphaned_segments,
)

DRIVER = """
import json, os, subprocess, sys, time
from miles_plan.backends.executor.janitor import MARKER, Belongings, Janitor
belongings = Belongings(**json.loads(sys.argv[1]))
janitor = Janitor(belongings)
os.environ[MARKER] = belongings.marker
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, janitor.pid, flush=True)
if sys.argv[2] == "dismiss":
    child.kill()
    child.wait()
    janitor.dismiss()
else:
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")


@pytest.fixture
def belongings(tmp_path: Path) -> Belongings:
    marker = secrets.token_hex(6)
    folder = tmp_path / "session"
    folder.mkdir()
    return Belongings(marker=marker, temporary=str(folder))


def start_driver(belongings: Belongings, mode: str) -> tuple[subprocess.Popen[str], int, int]:
    import json
    from dataclasses import asdict

    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(asdict(belongings)), mode], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child, janitor = (int(pid) for pid in process.stdout.readline().split())
    return process, child, janitor


def gone(pid: int, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_killed_driver_leaves_nothing(belongings: Belongings) -> None:
    driver, child, janitor = start_driver(belongings, "wait")
    assert child in list(processes_of(belongings.marker))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert gone(child, 15), "the driver's child outlived it"
    assert gone(janitor, 15), "the janitor outlived its work"
    assert not Path(belongings.temporary).exists()


WRITER = """
import torch
from miles_plan.backends.weight_transport.shared_memory import BucketPlan, SharedMemoryWriter
writer = SharedMemoryWriter()
bucket = writer.write(1, BucketPlan(0, 0, ("w",), True), [("w", torch.ones(4))])
print(bucket.handle, flush=True)
import time; time.sleep(60)
"""


def test_weights_of_a_dead_writer_go_and_those_of_a_live_one_stay() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    dead, alive = (Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout)
    writers[0].kill()
    writers[0].wait()
    try:
        if dead.parent == SHARED_MEMORY:
            assert dead.name in remove_orphaned_segments()
            assert not dead.exists()
            assert alive.exists()
    finally:
        writers[1].kill()
        writers[1].wait()
        remove_orphaned_segments()


def test_a_driver_that_ends_well_dismisses_it(belongings: Belongings) -> None:
    driver, child, janitor = start_driver(belongings, "dismiss")
    assert driver.wait(20) == 0
    assert gone(child, 1)
    assert gone(janitor, 5)
    assert Path(belongings.temporary).exists(), "what to do with the folder was the driver's affair"


def test_only_what_carries_the_marker_is_killed(belongings: Belongings) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, MARKER: "another"})
    try:
        assert all(not each.startswith("process") for each in clean_up(belongings))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
