"""Files that survive a power cut, and errors that name the path: a bare "No space left on device" helps nobody."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError that does not say which file it is about is raised again with `path` in it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` in one step, on disk when this returns: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with naming(path):
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """`write_durably` for JSON, keys in the order given."""
    write_durably(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def sync_file(path: Path) -> None:
    """Wait until the content of a file that is already written is on disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    sync_file(path)


def sha256_of(path: Path) -> str:
    """Digest of a file's content, read in chunks into one buffer; other threads work meanwhile."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with naming(path), path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()
