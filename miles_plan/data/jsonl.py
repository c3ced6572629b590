"""JSON Lines, read strictly and indexed by byte offset, so that a million lines take eight megabytes of memory.

One pass parses and checks every line and keeps only where each begins; rows are read again when they are needed. Every bad line
is reported, not only the first, because a data set is mended in one go or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from miles_plan.data.batch import Array
from miles_plan.data.problem import MAX_REPORTED, DataError, DataProblem

Row = dict[str, Any]
MAX_LINE_BYTES = 64 << 20  # a longer line is a file of another format: stop before it fills the memory


class FieldProblem(NamedTuple):
    """What is wrong with one row; field names the key whose value is at fault, None the row as a whole."""

    field: str | None
    message: str


RowCheck = Callable[[Row], Iterator[FieldProblem]]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class JsonlFile:
    """A checked file. offsets: int64 [rows + 1], row i being the bytes offsets[i] : offsets[i + 1], line i + 1 of the file."""

    path: Path
    offsets: Array
    sha256: str
    stamp: tuple[int, int, int]  # inode, size, mtime_ns: what was indexed

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def read(self, rows: Sequence[int] | Array) -> list[Row]:
        """The rows asked for, in that order. DataError when the file is gone or was changed since it was indexed."""
        with open_regular(self.path) as stream:
            if _stamp(stream) != self.stamp:
                raise DataError([DataProblem(str(self.path), 0, 0, "changed since it was indexed")])
            return [self._parse(stream, int(row)) for row in rows]

    def _parse(self, stream: BinaryIO, row: int) -> Row:
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        stream.seek(start)
        try:
            return parse_line(stream.read(stop - start))
        except LineError as error:
            raise DataError([DataProblem(str(self.path), row + 1, error.column, error.message)]) from None


class LineError(ValueError):
    """One line that is not a JSON object; column counts characters from 1."""

    def __init__(self, column: int, message: str) -> None:
        super().__init__(message)
        self.column = column
        self.message = message


def index_jsonl(path: str | os.PathLike[str], check: RowCheck) -> JsonlFile:
    """Parse every line, run `check` on every row, and return where the rows are. DataError lists what is wrong."""
    path = Path(path)
    digest, offsets, found, total = hashlib.sha256(), array("q", [0]), list[DataProblem](), 0
    with open_regular(path) as stream:
        stamp = _stamp(stream)
        for number, line in enumerate(_lines(stream, path), start=1):
            digest.update(line)
            offsets.append(offsets[-1] + len(line))
            for column, message in _line_problems(line, check):
                total += 1
                if len(found) < MAX_REPORTED:
                    found.append(DataProblem(str(path), number, column, message))
    if len(offsets) == 1:
        raise DataError([DataProblem(str(path), 0, 0, "the file is empty; it needs one JSON object a line")])
    if found:
        raise DataError(found, total)
    return JsonlFile(path=path, offsets=np.array(offsets, dtype=np.int64), sha256=digest.hexdigest(), stamp=stamp)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. DataError names the path and the reason; a pipe is refused before it can block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise DataError([DataProblem(str(path), 0, 0, f"is {kind}; a JSONL file is needed")])
        return path.open("rb")
    except OSError as error:
        raise DataError([DataProblem(str(path), 0, 0, f"cannot be read: {error.strerror or error}")]) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError([DataProblem(repr(str(path)), 0, 0, f"is no path: {error}")]) from error  # a NUL byte


def parse_line(line: bytes) -> Row:
    """The JSON object on one line. LineError for anything else, duplicate keys, NaN and infinities included."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        raise LineError(column, f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    if text.startswith("\ufeff"):
        raise LineError(1, "begins with a byte order mark; save the file as UTF-8 without one")
    if not text.strip():
        raise LineError(1, "the line is empty; each line holds one JSON object")
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise LineError(min(error.pos, len(text.rstrip("\r\n"))) + 1, f"not JSON: {error.msg}") from None
    except RecursionError:
        raise LineError(1, "nested too deeply") from None
    except ValueError as error:
        raise LineError(1, str(error)) from None
    if not isinstance(row, dict):
        raise LineError(1, f"expected a JSON object, found {json_type(row)}")
    return row


def column_of_field(line: str, name: str) -> int:
    """Column (from 1) of the value of a top-level key on a line that parses; 1 when the key is not there."""
    position = line.index("{") + 1
    while True:
        position = _skip_space(line, position)
        if line[position] == "}":
            return 1
        key, position = _DECODER.raw_decode(line, position)
        position = _skip_space(line, _skip_space(line, position) + 1)
        if key == name:
            return position + 1
        position = _skip_space(line, _DECODER.raw_decode(line, position)[1])
        position += line[position] == ","


def json_type(value: object) -> str:
    """The JSON name of a value's type, with its article: `a string`, `an object`, `null`."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    while True:
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise DataError([DataProblem(str(path), 0, 0, f"cannot be read: {error.strerror or error}")]) from error
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                [DataProblem(str(path), 0, 0, f"has a line longer than {MAX_LINE_BYTES >> 20} MiB; is this JSONL?")]
            )
        yield line


def _line_problems(line: bytes, check: RowCheck) -> Iterator[tuple[int, str]]:
    try:
        row = parse_line(line)
    except LineError as error:
        yield error.column, error.message
        return
    for field, message in check(row):
        yield (1 if field is None else column_of_field(line.decode("utf-8"), field)), message


def _stamp(stream: BinaryIO) -> tuple[int, int, int]:
    found = os.fstat(stream.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _skip_space(line: str, position: int) -> int:
    while line[position] in " \t\r\n":
        position += 1
    return position


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"the key '{repeated}' appears twice in one object")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float)
