"""Whole experiments, from data to report."""
