"""Memory, time and sync models: every figure an interval with its basis and its terms."""
