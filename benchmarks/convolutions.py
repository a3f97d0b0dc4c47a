"""Digits by a convolutional network, as in Louizos & Welling 2017 (section 4.2).

Digits and scores are those of ``neural_networks.py``. Fits take more steps and predictions more
draws, because the differences in likelihood are smaller than the remaining gain after 8,000 steps
and the noise of 300 draws. NUTS, on all images at once, gives the predictions of the exact
posterior. ::

    python -m benchmarks.convolutions --output benchmarks/results/convolutions.md
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt
import xarray as xr

from benchmarks.machine import describe
from benchmarks.networks import (
    BATCH,
    DIGITS,
    INDEPENDENT,
    KNOWN,
    Predict,
    about_digits,
    against_mean_field,
    command,
    digits,
    fit,
    judged,
    minimise,
    softmax,
    table,
)

# Number of filters.
FILTERS = 16
# Pixels along a side of a filter.
SIZE = 3
# Share of units that dropout removes.
DROPPED = 0.3
# Fit options.
OPTIONS = DIGITS | {"n": 16_000}
# Draws over which a prediction is averaged.
DRAWS = 2000
# Label of NUTS in the table.
NUTS = "NUTS, a chain"
# Positions of a filter along a side.
SIDE = 8 - SIZE + 1
# Means over blocks of two by two positions, as a matrix.
POOL = np.kron(np.kron(np.eye(SIDE // 2), [[0.5, 0.5]]), np.kron(np.eye(SIDE // 2), [[0.5, 0.5]]))
POOL = POOL.reshape(-1, SIDE**2)


def patches(images: np.ndarray) -> np.ndarray:
    """Pixels under a filter at each position, and a one for the bias (images, positions, 10)."""
    square = images[:, :64].reshape(-1, 8, 8)
    seen = np.lib.stride_tricks.sliding_window_view(square, (SIZE, SIZE), axis=(1, 2))
    seen = seen.reshape(len(images), SIDE**2, SIZE**2)
    return np.concatenate([seen, np.ones((*seen.shape[:2], 1))], axis=2)


def model(minibatches: bool = True) -> pm.Model:
    """Filters, tanh units, means of two by two units, classes; on minibatches or all images."""
    (images, labels), _, _ = digits()
    batch, answers = pt.constant(patches(images)), labels.astype("int32")
    if minibatches:
        batch, answers = pm.Minibatch(patches(images), answers, batch_size=BATCH)
    with pm.Model() as made:
        kernel = pm.Normal("kernel", shape=(FILTERS, 1, SIZE, SIZE))
        bias = pm.Normal("bias", shape=(1, FILTERS))
        last = pm.Normal("last", shape=(FILTERS * len(POOL), len(KNOWN)))
        filters = pt.concatenate([kernel.reshape((FILTERS, SIZE**2)).T, bias])
        units = pt.tanh(batch.reshape((-1, SIZE**2 + 1)) @ filters)
        units = units.reshape((-1, SIDE**2, FILTERS))
        pooled = pt.tensordot(units, POOL, axes=[[1], [1]]).reshape((-1, FILTERS * len(POOL)))
        pm.Categorical("label", logit_p=pooled @ last, observed=answers, total_size=len(labels))
    return made


def features(filters: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units (images, positions, filters), and their means (images, filters x blocks)."""
    units = np.tanh(seen @ filters)
    return units, (POOL @ units).swapaxes(1, 2).reshape(len(seen), -1)


def predictions(posterior: xr.Dataset) -> Predict:
    """A function from images to predictive probabilities, averaged over draws."""
    draws = [posterior[name].values[0] for name in ("kernel", "bias", "last")]

    def predict(images):
        seen, total = patches(images), 0.0
        for kernel, bias, last in zip(*draws, strict=True):
            filters = np.concatenate([kernel.reshape(FILTERS, -1).T, bias])
            total = total + softmax(features(filters, seen)[1] @ last)
        return total / len(draws[0])

    return predict


def network(seed: int, rate: float = 0.0, steps: int = 4000, draws: int = 200) -> Predict:
    """An ordinary network of this size, with or without dropout before the last layer."""
    (images, labels), _, _ = digits()
    rng, seen = np.random.default_rng(seed), patches(images)

    def kept(generator, shape):
        return (generator.random(shape) >= rate) / (1 - rate)

    def gradients(weights):
        rows = rng.choice(len(images), BATCH, replace=False)
        units, pooled = features(weights[0], seen[rows])
        mask = kept(rng, pooled.shape)
        p = softmax((pooled * mask) @ weights[1])
        p[np.arange(BATCH), labels[rows]] -= 1
        back = ((p @ weights[1].T) * mask).reshape(BATCH, FILTERS, -1).swapaxes(1, 2)
        back = (POOL.T @ back) * (1 - units**2)
        found = [np.tensordot(seen[rows], back, axes=((0, 1), (0, 1))), (pooled * mask).T @ p]
        # the weight decay is that of a unit normal prior
        return [g / BATCH + w / len(images) for g, w in zip(found, weights, strict=True)]

    shapes = (SIZE**2 + 1, FILTERS), (FILTERS * len(POOL), len(KNOWN))
    weights = minimise([rng.normal(size=s) / s[0] ** 0.5 for s in shapes], gradients, steps)

    def predict(x):
        _, pooled = features(weights[0], patches(x))
        if not rate:
            return softmax(pooled @ weights[1])
        masks = kept(np.random.default_rng(seed), (draws, 1, pooled.shape[1]))
        return np.mean([softmax((pooled * m) @ weights[1]) for m in masks], axis=0)

    return predict


def classifiers(seed: int) -> list[dict]:
    """Scores of all methods for one seed."""
    rows = []
    for method in ("mnf", INDEPENDENT, "mean field"):
        approx, step = fit(model(), method, seed, OPTIONS)
        posterior = approx.sample(DRAWS, random_seed=seed).posterior
        rows.append(judged(method, seed, predictions(posterior)) | {"ms a step": step})
    nets = [network(100 * seed + i) for i in range(5)]
    rows.append(judged("one network", seed, nets[0]))
    rows.append(judged("ensemble of 5", seed, lambda x: np.mean([n(x) for n in nets], axis=0)))
    rows.append(judged("dropout", seed, network(100 * seed, rate=DROPPED)))
    return rows


def nuts() -> list[dict]:
    """NUTS on all images, by nutpie: two chains of 250 draws after 300."""
    import nutpie

    compiled = nutpie.compile_pymc_model(
        model(minibatches=False), backend="jax", gradient_backend="jax"
    )
    posterior = nutpie.sample(
        compiled, draws=250, tune=300, chains=2, seed=1, progress_bar=False
    ).posterior
    return [judged(NUTS, c + 1, predictions(posterior.isel(chain=[c]))) for c in range(2)]


def report(rows: pd.DataFrame) -> str:
    """Write the table and its explanation."""
    return "\n".join(
        [
            "# Digits by a convolutional network",
            "",
            about_digits(
                f"{FILTERS} filters of {SIZE} x {SIZE}, tanh units, means of two by two units"
            )
            + " Where weights are independent, the last layer's products are drawn locally. "
            f"Fits take {OPTIONS['n']:,} steps, predictions {DRAWS:,} draws. NUTS has two chains "
            "of 250 draws.",
            "",
            *table(rows),
            "",
            *against_mean_field(rows),
            f"{describe('jax')}.",
            "",
        ]
    )


def main() -> None:
    def make(options: argparse.Namespace) -> str:
        seeds = range(1, options.seeds + 1)
        fits = [row for seed in seeds for row in classifiers(seed)]
        return report(pd.DataFrame(fits + nuts()))

    command(__doc__, make)


if __name__ == "__main__":
    main()
