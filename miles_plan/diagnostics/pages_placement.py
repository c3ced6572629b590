"""Pages of MP2xx, placement and memory."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = ()
