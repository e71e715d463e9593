"""Hostile input of every kind, by seeded mutation of good input; see `trials`."""
