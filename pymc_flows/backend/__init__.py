"""Which backend computes, and how a graph is compiled for it."""
