"""What a training step computes: advantages, losses and corrections, each with its paper.

Advantages, filters and corrections work on NumPy columns of a whole batch, losses on torch tensors of one micro-batch. Losses
are sums of per-token terms times weights that already hold the global counts (`aggregation.token_weights`), so adding them up
over micro-batches and data-parallel ranks gives the loss of the whole batch, whatever the split.
"""
