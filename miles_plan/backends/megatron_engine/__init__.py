"""A Megatron-core trainer behind the engine protocol; Megatron and Transformer Engine are imported when one is made."""
