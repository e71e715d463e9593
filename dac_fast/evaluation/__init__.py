"""How near restored audio comes to the original, over a set of files."""
