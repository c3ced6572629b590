"""Runs of the real engines on GPUs: bring-up of one engine, and whole plans."""
