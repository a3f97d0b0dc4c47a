"""Named recipes for flows, PyMC 3's formulas, and the list of all families."""
