"""A trainer of the transformers implementation under torch's fully_shard (FSDP2), behind the engine protocol."""
