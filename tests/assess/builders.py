"""Results for the tests of comparisons, made with NumPy."""

import numpy as np
import xarray as xr


def normal(loc=0.0, scale=1.0, *, draws=4000, shape=(), seed=0):
    return np.random.default_rng(seed).normal(loc, scale, size=(draws, *shape))


def tree(chains=4, coords=None, **variables):
    """Make a result of variables given as (draws, *shape) or (dims, values)."""
    data = {}
    for name, values in variables.items():
        dims, values = values if isinstance(values, tuple) else ((), values)
        dims = dims or tuple(f"{name}_dim_{i}" for i in range(values.ndim - 1))
        data[name] = (("chain", "draw", *dims), values.reshape(chains, -1, *values.shape[1:]))
    return xr.DataTree.from_dict({"posterior": xr.Dataset(data, coords=coords)})
