"""Checkpoints: a folder written under another name, a manifest with every file's hash written last, then one rename.

A checkpoint is a cut of the run: everything up to an iteration is in it and nothing after. Loading believes nothing: a file
that is missing, short or changed makes the checkpoint bad, the file is named, and the one before it is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.durable_files import naming, sha256_of, sync_directory, sync_file, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WRITING = ".writing-"
DISCARDED = ".discarded-"
HASHERS = 8  # files hashed at once: one core does 1.5 GB/s, less than a disk and far less than memory


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of a checkpoint: path below its folder, size, SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    done: per task, iterations of its loop that are behind it; cursors and weights_made: rows drawn and weight versions made, by
    instance as `task@iteration`; older_weights: versions before the newest that rollouts after the cut still ask for, each with
    its file; metrics: lines of iterations in the checkpoint that metrics.jsonl did not have yet; journal_row: the last row of
    the journal when it was written.
    """

    plan_sha256: str
    loop: str
    iteration: int
    weight_version: int
    done: Mapping[str, int]
    cursors: Mapping[str, int]
    weights_made: Mapping[str, int]
    older_weights: Mapping[str, str]
    metrics: Sequence[Mapping[str, Any]]
    journal_row: int
    seed: int
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a checkpoint cannot be used; `path` is the file at fault."""

    path: Path
    reason: str


def checkpoint_name(weight_version: int) -> str:
    """`step-000040`: the weights after so many training steps."""
    return f"step-{weight_version:06d}"


def open_writing(checkpoints: Path, weight_version: int) -> Path:
    """A new folder to write a checkpoint into; it is no checkpoint before `commit`."""
    folder = checkpoints / f"{WRITING}{checkpoint_name(weight_version)}"
    with naming(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def record_files(folder: Path, paths: Iterable[str]) -> tuple[FileRecord, ...]:
    """Size and hash of files below `folder`, each on disk when this returns; several are hashed at once."""

    def record(name: str) -> FileRecord:
        path = folder / name
        sync_file(path)
        return FileRecord(path=name, size_bytes=path.stat().st_size, sha256=sha256_of(path))

    with ThreadPoolExecutor(HASHERS) as pool:
        return tuple(pool.map(record, sorted(set(paths))))


def commit(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest, then give the folder its name. Before the rename there is no checkpoint, after it a whole one."""
    body = asdict(manifest)
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "manifest_sha256": _digest(body), "manifest": body})
    for below in {path.parent for path in folder.rglob("*")}:
        sync_directory(below)
    final = folder.with_name(folder.name.removeprefix(WRITING))
    with naming(final):
        if final.exists():
            discard(final)
        os.rename(folder, final)
        sync_directory(final.parent)
    return final


def keep_newest(checkpoints: Path, keep: int) -> list[str]:
    """Delete all but the newest `keep` checkpoints; returns the names of those deleted."""
    extra = all_checkpoints(checkpoints)[max(1, keep) :]
    for folder in extra:
        discard(folder)
    return [folder.name for folder in extra]


def discard(folder: Path) -> None:
    """Delete a checkpoint: the rename makes it vanish in one step, whatever happens to the rest."""
    gone = folder.with_name(f"{DISCARDED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(checkpoints: Path) -> list[str]:
    """Remove what a killed process left half written or half deleted; returns the names."""
    found = [path for path in checkpoints.glob(".*") if path.name.startswith((WRITING, DISCARDED))]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in found)


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that claim to be checkpoints, newest first."""
    return sorted((path for path in checkpoints.glob("step-*") if path.is_dir()), reverse=True)


def newest_good(checkpoints: Path, plan_sha256: str) -> tuple[Path | None, Manifest | None, list[Refusal]]:
    """The newest checkpoint of this plan whose every file is as it was written, and why newer ones were refused."""
    refusals: list[Refusal] = []
    for folder in all_checkpoints(checkpoints):
        found = read_manifest(folder, plan_sha256)
        if isinstance(found, Manifest):
            with ThreadPoolExecutor(HASHERS) as pool:
                bad = [refusal for refusal in pool.map(partial(_wrong, folder), found.files) if refusal]
            if not bad:
                return folder, found, refusals
            found = bad[0]
        refusals.append(found)
    return None, None, refusals


def read_manifest(folder: Path, plan_sha256: str) -> Manifest | Refusal:
    """The manifest of a checkpoint of this plan, or why there is none."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        body = data["manifest"]
        if data["format_version"] != FORMAT_VERSION:
            return Refusal(path, f"format {data['format_version']}, this miles-plan reads {FORMAT_VERSION}")
        if data["manifest_sha256"] != _digest(body):
            return Refusal(path, "changed after it was written")
        manifest = Manifest(**{**body, "files": tuple(FileRecord(**record) for record in body["files"])})
    except FileNotFoundError:
        return Refusal(path, "missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Refusal(path, f"not a manifest: {error}")
    if manifest.plan_sha256 != plan_sha256:
        return Refusal(path, f"of another plan ({manifest.plan_sha256[:12]}, this one is {plan_sha256[:12]})")
    return manifest


def _wrong(folder: Path, record: FileRecord) -> Refusal | None:
    path = folder / record.path
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            return Refusal(path, f"{size_bytes} bytes, {record.size_bytes} were written")
        if sha256_of(path) != record.sha256:
            return Refusal(path, "its content changed after it was written")
    except FileNotFoundError:
        return Refusal(path, "missing")
    except OSError as error:
        return Refusal(path, f"cannot be read: {error.strerror}")
    return None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
