"""Groups of variables: flows, multiplicative flows, and adapters for PyMC's own groups."""
