"""The console that tables are printed on."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_COLUMNS = 120  # width where there is no terminal: a table must not depend on who reads it


def console() -> Console:
    """Standard output; a pipe gets plain text of a fixed width."""
    return Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS, highlight=False, soft_wrap=False)
