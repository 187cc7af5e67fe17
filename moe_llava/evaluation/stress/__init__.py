"""Perturbations and attacks, what they cost, and questions about objects that are not there."""
