"""Importance weights and distances between draws: NumPy arrays in, numbers out."""
