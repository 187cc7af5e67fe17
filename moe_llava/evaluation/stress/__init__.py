"""Perturbations and attacks, their cost, and questions about absent objects."""
