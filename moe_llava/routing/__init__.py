"""Trace and show which experts took which tokens."""
