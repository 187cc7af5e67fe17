"""The embedded world: scenes of real handwritten digits, questions about them, and the small parts that learn on it."""

from pathlib import Path

RECIPE = Path(__file__).with_name("recipe.yaml")  # what the demo trains by; the same as recipes/digits.yaml
