"""Benchmarks: each prints a table and writes JSON with the machine, the date and the versions."""
