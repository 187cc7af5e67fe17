"""Helpers for every room. They import neither another room, nor torch, nor transformers."""
