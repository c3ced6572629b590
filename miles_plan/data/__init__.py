"""What a run eats: JSONL prompts, tokenizers, sample batches, the arithmetic task."""
