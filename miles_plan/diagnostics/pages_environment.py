"""Pages of MP4xx, backends and environment."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = ()
