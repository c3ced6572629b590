"""Time and check the batch-invariant kernels: `python -m benchmarks.kernels --shapes FILE.json --out FILE.json`."""
