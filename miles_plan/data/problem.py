"""What is wrong with a data file, place by place: the command line turns each finding into a diagnostic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_REPORTED = 20


class DataProblem(NamedTuple):
    """One finding. line and column count from 1, columns in characters; 0 means the file as a whole."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        """`path:line:column: message`, without the parts that are 0."""
        place = ":".join(str(part) for part in (self.path, self.line, self.column) if part)
        return f"{place}: {self.message}"


class DataError(ValueError):
    """A data file cannot be used: `problems` holds the first findings in file order, `total` counts all of them."""

    def __init__(self, problems: Sequence[DataProblem], total: int | None = None) -> None:
        self.problems = tuple(problems[:MAX_REPORTED])
        self.total = len(problems) if total is None else total
        lines = [str(problem) for problem in self.problems]
        if self.total > len(lines):
            lines.append(f"{self.problems[0].path}: and {self.total - len(lines)} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[DataProblem, ...], int]]:
        """Exceptions cross process borders by pickle, which would otherwise call us with the message."""
        return DataError, (self.problems, self.total)
