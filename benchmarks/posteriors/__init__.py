"""Posteriors with published references: models, data, reference draws, and NUTS's cost."""
