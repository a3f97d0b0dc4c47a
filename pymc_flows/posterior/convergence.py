"""Convergence of chains of draws, over all scalars of a posterior."""

from __future__ import annotations

import numpy as np
from xarray import DataTree


def worst_convergence(idata: DataTree) -> tuple[float, float]:
    """Compute the largest R-hat and the smallest bulk effective sample size over all scalars.

    Vehtari et al. 2021, arXiv:1903.08008. Scalars that never change are left out.

    Parameters
    ----------
    idata : DataTree
        Its ``posterior`` has dimensions ``chain`` and ``draw``.

    Returns
    -------
    tuple of float
        R-hat (1 if there is a single chain) and effective sample size, a number of draws.

    Examples
    --------
    >>> import arviz as az
    >>> import numpy as np
    >>> x = np.random.default_rng(1).normal(size=(4, 500))
    >>> rhat, ess = worst_convergence(az.from_dict({"posterior": {"x": x}}))
    >>> rhat < 1.01, 1000 < ess < 4000
    (True, True)
    """
    from arviz_stats.base import array_stats  # slow to import

    rhats, sizes = [1.0], [np.inf]
    for values in idata["posterior"].data_vars.values():
        array = np.asarray(values.transpose("chain", "draw", ...), dtype=float)
        array = array.reshape((*array.shape[:2], -1))
        array = array[..., array.std(axis=(0, 1)) > 0]
        if not array.size:
            continue
        sizes.append(float(np.min(array_stats.ess(array, chain_axis=0, draw_axis=1))))
        if array.shape[0] > 1:
            rhats.append(float(np.max(array_stats.rhat(array, chain_axis=0, draw_axis=1))))
    return max(rhats), min(sizes)
