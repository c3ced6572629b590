"""Pages of MP3xx, precision and routing."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = ()
