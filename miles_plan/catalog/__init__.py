"""Models and GPUs as data: architectures, link speeds, memory, prices, each figure with its source."""
