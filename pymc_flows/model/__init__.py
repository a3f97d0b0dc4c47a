"""Facts read from a PyMC model: its log density, structure, priors and minibatches."""
