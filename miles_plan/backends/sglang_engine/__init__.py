"""SGLang as a rollout engine: arguments from the plan, one server process an engine, weights by CUDA IPC or NCCL."""
