"""Printing findings: the same way from every command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.options import OutputFormat
from miles_plan.diagnostics import Diagnostic, render, report


def show_findings(
    diagnostics: Iterable[Diagnostic],
    sources: Mapping[str, str],
    format: OutputFormat = OutputFormat.FULL,
    stream: TextIO | None = None,
) -> ExitCode:
    """Print the findings (to standard error unless told otherwise) and return the exit code that they mean."""
    stream = stream or sys.stderr
    found = report(diagnostics, sources)
    stream.write(render(found, format.value, color=wants_color(stream)))
    return ExitCode.DIAGNOSTICS if found["summary"]["errors"] else ExitCode.FINE


def wants_color(stream: TextIO) -> bool:
    """Color on terminals, unless NO_COLOR is set (https://no-color.org) or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
