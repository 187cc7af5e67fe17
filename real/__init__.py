"""The whole pipeline on real weights and real pictures, on a laptop: `make real`. See docs/real.md.

Nothing here is installed with the package, and nothing that it downloads is part of this repository.
"""
