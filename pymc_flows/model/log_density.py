"""The log density of a PyMC model on a batch of draws."""

from __future__ import annotations

from collections.abc import Mapping

from pymc.model import Model
from pymc.variational.opvi import Approximation
from pytensor.graph.basic import Variable
from pytensor.graph.replace import graph_replace
from pytensor.tensor.variable import TensorVariable

from pymc_flows.model.batching import batch_graphs
from pymc_flows.model.local_reparameterization import LocalDraws


def value_slices(approx: Approximation, x: TensorVariable) -> dict[str, TensorVariable]:
    r"""Split a batch of unconstrained draws into the model's value variables.

    Parameters
    ----------
    approx : Approximation
        Its groups determine the order of the columns of x.
    x : TensorVariable
        (draws, dim), unconstrained.

    Returns
    -------
    dict of str to TensorVariable
        Name of the value variable to its draws, of shape (draws, \*shape of the variable).

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> import pytensor.tensor as pt
    >>> import pymc_flows as pmf
    >>> with pm.Model() as model:
    ...     a, b = pm.Normal("a", shape=2), pm.HalfNormal("b")
    >>> approx = pmf.NFVI("scale-loc", model=model).approx
    >>> slices = value_slices(approx, pt.constant(np.arange(6.0).reshape(2, 3)))
    >>> {name: value.eval(mode="FAST_COMPILE").tolist() for name, value in slices.items()}
    {'a': [[0.0, 1.0], [3.0, 4.0]], 'b_log__': [2.0, 5.0]}
    """
    values, start = {}, 0
    n_draws = x.shape[0] if x.type.shape[0] is None else x.type.shape[0]
    for group in approx.groups:
        for name, where, shape, dtype in group.ordering.values():
            piece = x[:, start + where.start : start + where.stop]
            values[name] = piece.reshape((n_draws, *shape)).astype(dtype)
        start += group.ddim
    return values


def log_density(
    approx: Approximation,
    x: TensorVariable,
    vectorize: bool | None = None,
    more_replacements: Mapping[Variable, Variable] | None = None,
    model: Model | None = None,
    jacobian: bool = True,
    local: LocalDraws | None = None,
) -> list[TensorVariable]:
    """Build the log prior and the log likelihood of each draw.

    Parameters
    ----------
    approx : Approximation
        Its groups determine the order of the columns of x.
    x : TensorVariable
        (draws, dim), unconstrained.
    vectorize : bool, optional
        As in :func:`pymc_flows.model.batching.batch_graphs`.
    more_replacements : mapping of Variable to Variable, optional
        Variables of the model's graph to their replacements, such as a minibatch of the data.
    model : Model, optional
        The model to evaluate, by default the approximation's. It must have the same free variables.
    jacobian : bool, default True
        Add the log-determinants of the transforms' Jacobians to the prior.
    local : LocalDraws, optional
        Products of data and weights that the likelihood takes in place of the weights.

    Returns
    -------
    list of TensorVariable
        Log prior and log likelihood, in nats, both of shape (draws,). The likelihood includes the
        potentials, and the prior the log-determinants of the Jacobians.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> import pytensor.tensor as pt
    >>> import pymc_flows as pmf
    >>> with pm.Model() as model:
    ...     mu = pm.Normal("mu")
    ...     y = pm.Normal("y", mu, observed=1.0)
    >>> approx = pmf.NFVI("scale-loc", model=model).approx
    >>> prior, likelihood = log_density(approx, pt.constant([[0.0], [1.0]]))
    >>> prior.eval(mode="FAST_COMPILE").round(2).tolist()
    [-0.92, -1.42]
    >>> likelihood.eval(mode="FAST_COMPILE").round(2).tolist()
    [-1.42, -0.92]
    """
    model = model or approx.model
    graphs = [model.logp(vars=model.free_RVs, jacobian=jacobian), model.datalogp]
    if more_replacements:
        graphs = graph_replace(graphs, dict(more_replacements), strict=False)
    more_values = None
    if local is not None:
        graphs[1], more_values = local.substitute(graphs[1])
    return batch_graphs(graphs, model, value_slices(approx, x), vectorize, more_values)
