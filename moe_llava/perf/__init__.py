"""Measure speed and memory side by side: a layer, a model, a training step, generation, a server, loading."""
