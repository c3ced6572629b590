"""Batch-invariant kernels, one op a file, each with its torch reference."""
