"""What is read from a PyMC model: its log density, space, priors and minibatches."""
