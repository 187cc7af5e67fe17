"""Query a checkpoint with the questions of a benchmark, and keep its answers."""
