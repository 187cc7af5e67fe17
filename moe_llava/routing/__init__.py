"""What the routers did: which expert took which tokens."""
