"""A spec file's bytes -> text, or a diagnostic that says at which byte it is no text."""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path

from miles_plan.diagnostics import Diagnostic, Location, error, excerpt, nearest
from miles_plan.spec.limits import MAX_FILE_BYTES

_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark its own starts with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_source(path: Path, file: str, named_at: Location | None = None) -> str | Diagnostic:
    """The text of `path`, which diagnostics call `file`. `named_at` is where a spec names it, if one does."""
    where, shown = named_at or Location(file), excerpt(file, 200)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return error("MP101", f"`{shown}` is not a regular file", where)
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return error("MP101", f"no file `{shown}`", where, help=_near(path))
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        return error("MP101", f"cannot read `{shown}`: {getattr(problem, 'strerror', None) or problem}", where)
    if len(raw) > MAX_FILE_BYTES:
        help = "move data into a file of its own and name the file in the spec"
        return error("MP103", f"`{shown}` is larger than {MAX_FILE_BYTES:,} bytes", where, help=help)
    return decode(raw, file)


def decode(raw: bytes, file: str) -> str | Diagnostic:
    """UTF-8 bytes, with or without a byte order mark, as text without control characters."""
    for mark, encoding in _OTHER_ENCODINGS:
        if raw.startswith(mark):
            return error("MP102", f"the file is {encoding}, not UTF-8", Location(file, 1, 1), help="save it as UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        place = _place(raw[: problem.start].decode(), file)
        return error("MP102", f"byte 0x{raw[problem.start]:02x} is not UTF-8", place, help="save the file as UTF-8")
    if bad := _FORBIDDEN.search(text):
        place = _place(text[: bad.start()], file)
        return error("MP102", f"control character U+{ord(bad[0]):04X} in the file", place, help="remove it")
    return text


def _place(before: str, file: str) -> Location:
    lines = f"{before}.".splitlines()  # the dot stands for the character at fault
    return Location(file, len(lines), len(lines[-1]))


def _near(path: Path) -> str:
    """A hint when the directory holds a YAML file with a similar name, or the directory itself is missing."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.suffix in {".yaml", ".yml"}]
    except OSError:
        return f"there is no directory `{path.parent}`"
    close = nearest(path.name, names)
    return f"did you mean `{path.parent / close}`?" if close else ""
