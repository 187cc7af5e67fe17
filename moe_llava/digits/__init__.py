"""The embedded world: scenes of real handwritten digits, questions about them, and small pretrained components."""

from pathlib import Path

RECIPE = Path(__file__).with_name("recipe.yaml")  # the demo's recipe; the same as recipes/digits.yaml
