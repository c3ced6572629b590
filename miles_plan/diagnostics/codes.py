"""The one table of diagnostic codes. To add a code, add its page to the module of its range; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from miles_plan.diagnostics import (
    pages_environment,
    pages_internal,
    pages_placement,
    pages_precision,
    pages_run,
    pages_spec,
)
from miles_plan.diagnostics.page import Page

RANGES: Mapping[str, str] = MappingProxyType(
    {
        "MP1": "The spec",
        "MP2": "Placement and memory",
        "MP3": "Precision and routing",
        "MP4": "Backends and environment",
        "MP5": "Running",
        "MP9": "Our own bugs",
    }
)


def _table() -> Mapping[str, Page]:
    modules = (pages_spec, pages_placement, pages_precision, pages_environment, pages_run, pages_internal)
    table: dict[str, Page] = {}
    for page in (page for module in modules for page in module.PAGES):
        if page.code in table:
            raise ValueError(f"two pages for {page.code}")
        table[page.code] = page
    return MappingProxyType(dict(sorted(table.items())))


PAGES: Mapping[str, Page] = _table()


def explanation(code: str) -> Page:
    """The page of `code`; ValueError if the table has none."""
    try:
        return PAGES[code]
    except KeyError:
        raise ValueError(f"no page for diagnostic code {code!r}: add one to miles_plan/diagnostics/pages_*.py") from None
