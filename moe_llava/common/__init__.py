"""What every room uses. Imports nothing else of the package, and neither torch nor transformers."""
