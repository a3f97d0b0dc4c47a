"""Named recipes for flows, PyMC 3's formulas, and the table of all families."""
