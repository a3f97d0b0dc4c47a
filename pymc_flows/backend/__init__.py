"""Backends: compile a graph for JAX, Numba, C or NumPy."""
