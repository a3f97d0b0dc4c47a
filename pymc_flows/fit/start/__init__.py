"""The search for a start: modes, curvature, and the Gaussian inside which a flow trains."""
