"""How fast the package is: each file measures one part, variants side by side."""
