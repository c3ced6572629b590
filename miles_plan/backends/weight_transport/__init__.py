"""Weights from trainers to rollout engines, as full tensors in buckets, whatever the trainer shards."""
