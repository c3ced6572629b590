"""Holds the estimates against published and measured rows: one module a kind of row, and the report over all of them."""
