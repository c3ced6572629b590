"""What a machine must have for a run, looked at one by one: `miles-plan doctor` prints them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warning", "problem"]
GIB = 1 << 30
PACKAGES = ("ray", "torch", "transformers", "tokenizers", "safetensors", "tensorboard", "psutil", "numpy")
TOKENS_SINCE = (2, 52)  # the first release of Ray with token authentication


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `help` says what to do where it is not ok."""

    subject: str
    verdict: Verdict
    found: str
    help: str = ""


def machine_checks(folder: Path) -> Iterator[Check]:
    """Checks in the order in which a run would meet what they are about. `folder` is where runs would be written."""
    yield _python()
    yield from (_package(name) for name in PACKAGES)
    yield _ray_tokens()
    yield _cores()
    yield _space("shared memory", Path("/dev/shm"), GIB, "Ray's objects and weights on their way lie there")
    yield _space("temporary folder", Path("/tmp"), GIB, "Ray's logs and offloaded parts lie there")
    yield _space("run folder", folder, GIB, "checkpoints lie there")
    yield _loopback()
    yield _gpus()


def _python() -> Check:
    version = sys.version.split()[0]
    return Check("Python", "ok" if sys.version_info >= (3, 11) else "problem", version, "3.11 or later is needed")


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "problem", "not installed", "pip install 'miles-plan[run]'")


def _ray_tokens() -> Check:
    try:
        release = tuple(int(part) for part in importlib.metadata.version("ray").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return Check("Ray tokens", "problem", "unknown")
    if release >= TOKENS_SINCE:
        return Check("Ray tokens", "ok", "every call to Ray carries a token")
    return Check(
        "Ray tokens", "warning", "this Ray has none", "ray 2.52 or later; until then anyone on this machine can reach a run"
    )


def _cores() -> Check:
    cores = os.cpu_count() or 1
    return Check("cores", "ok" if cores > 1 else "warning", str(cores), "with one core Ray's own processes take much of it")


def _space(subject: str, folder: Path, least_bytes: int, why: str) -> Check:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    found = f"{free / GIB:.1f} GiB free at {folder}" + ("" if writable else ", not writable")
    return Check(
        subject,
        "ok" if writable and free >= least_bytes else "problem",
        found,
        f"{why}; {least_bytes / GIB:.0f} GiB are needed",
    )


def _loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Check("loopback", "ok", f"a port could be opened ({server.getsockname()[1]})")
    except OSError as error:
        return Check("loopback", "problem", str(error.strerror), "Ray listens on 127.0.0.1 only and needs it")


def gpu_names() -> list[str]:
    """Name and memory of every NVIDIA GPU, as its driver's tool prints them; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _gpus() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("GPUs", "ok", "none; specs with cluster.gpu: cpu run here")
    names = gpu_names()
    found = "; ".join(names) or "nvidia-smi is there and shows none"
    return Check("GPUs", "ok" if names else "warning", found, "the driver does not answer, or this container has no GPU")
