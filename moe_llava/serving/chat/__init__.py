"""A conversation with a checkpoint on the terminal."""
