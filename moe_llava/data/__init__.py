"""LLaVA records: reading and checking them, prompts and label masks, batches."""
