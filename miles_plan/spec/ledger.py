"""The consumption ledger: which leaf fields of a spec were read, and by whom.

A setting that is accepted and does nothing is the costliest mistake people report about RL frameworks, and a silent one. So
every read of a leaf field inside `reading_as` is written down, and `unread()` is what no pass or backend looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Ledger:
    """Reads of one loaded spec. `leaves` are its leaf paths in spec order; `inert` says why some of them decide nothing."""

    def __init__(self, leaves: Iterator[str], inert: Mapping[str, str]) -> None:
        self._readers: dict[str, dict[str, None]] = {path: {} for path in leaves}
        self._inert = dict(inert)
        self.reader = ""
        """Who is reading now; empty for nobody."""

    @contextmanager
    def reading_as(self, reader: str) -> Iterator[None]:
        """Reads of fields inside the block count as made by `reader` (a pass or backend); the innermost name wins."""
        if not reader:
            raise ValueError("a reader needs a name")
        before, self.reader = self.reader, reader
        try:
            yield
        finally:
            self.reader = before

    def note(self, path: str) -> None:
        """A field was read. Outside `reading_as` it does not count: printing a spec is no use of it."""
        if self.reader and path in self._readers:
            self._readers[path][self.reader] = None

    def readers(self, path: str) -> tuple[str, ...]:
        """Who read the leaf, in order of first reading; KeyError if the spec has no such leaf."""
        return tuple(self._readers[path])

    def unread(self) -> tuple[str, ...]:
        """Leaf paths, in spec order, that nobody read and that are not declared inert."""
        return tuple(path for path, readers in self._readers.items() if not readers and path not in self._inert)
