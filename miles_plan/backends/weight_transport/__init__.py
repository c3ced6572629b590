"""Weights from trainers to rollout engines: buckets of full tensors in shared memory, in GPU memory, or by broadcast."""
