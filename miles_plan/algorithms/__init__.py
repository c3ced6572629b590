"""What a training step computes: losses, advantages, corrections."""
