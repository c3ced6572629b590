"""Where in the user's text a finding belongs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A span of one file. Lines and columns count characters from 1; the end is exclusive.

    `line` 0 means the file as a whole. `end_line` and `end_column` 0 mean that only the start is known. `file` is what the
    user typed, or `--set` for overrides given on the command line (one argument a line).
    """

    file: str
    line: int = 0
    column: int = 0
    end_line: int = 0
    end_column: int = 0

    def __str__(self) -> str:
        """`file:line:column`, the form that editors and terminals turn into a link."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file
