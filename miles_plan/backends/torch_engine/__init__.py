"""The embedded engines: a trainer and a rollout engine in plain torch, on CPU or one GPU, that agree bit for bit."""
