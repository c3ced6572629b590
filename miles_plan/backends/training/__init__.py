"""What every trainer shares, whatever runs its model: batches, micro-batches, losses, offloading, checkpoint files."""
