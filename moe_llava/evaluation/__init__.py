"""Evaluate checkpoints on benchmarks, and score their answers."""
