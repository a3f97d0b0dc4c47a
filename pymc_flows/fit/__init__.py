"""Fitting: the start, the objective, the training, and when it ends."""
