"""Digits by a convolutional network, as in Louizos & Welling 2017 (section 4.2).

The digits and what is judged are those of ``neural_networks.py``. ::

    python benchmarks/convolutions.py --output benchmarks/results/convolutions.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt
from neural_networks import (
    BATCH,
    DIGITS,
    KNOWN,
    TRAINED,
    digits,
    fit,
    judged,
    minimise,
    softmax,
    table,
)

FILTERS, SIZE, DROPPED = 16, 3, 0.3
SIDE = 8 - SIZE + 1  # positions of a filter along a side
# Mean of each two by two positions.
POOL = np.kron(np.kron(np.eye(SIDE // 2), [[0.5, 0.5]]), np.kron(np.eye(SIDE // 2), [[0.5, 0.5]]))
POOL = POOL.reshape(-1, SIDE**2)


def patches(images) -> np.ndarray:
    """What a filter sees at each position, and a one for its bias (images, positions, 10)."""
    square = images[:, :64].reshape(-1, 8, 8)
    seen = np.lib.stride_tricks.sliding_window_view(square, (SIZE, SIZE), axis=(1, 2))
    seen = seen.reshape(len(images), SIDE**2, SIZE**2)
    return np.concatenate([seen, np.ones((*seen.shape[:2], 1))], axis=2)


def model() -> pm.Model:
    """Filters, tanh units, means of two by two of them, classes; on minibatches."""
    (images, labels), _, _ = digits()
    batch, answers = pm.Minibatch(patches(images), labels.astype("int32"), batch_size=BATCH)
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


def features(filters, seen) -> tuple[np.ndarray, np.ndarray]:
    """Units (images, positions, filters), and their means (images, filters x places)."""
    units = np.tanh(seen @ filters)
    return units, np.einsum("npf,qp->nfq", units, POOL).reshape(len(seen), -1)


def predictions(posterior):
    """Predictive probabilities of images, averaged over draws."""
    draws = [posterior[name].values[0] for name in ("kernel", "bias", "last")]

    def predict(images):
        seen, total = patches(images), 0.0
        for kernel, bias, last in zip(*draws, strict=True):
            filters = np.concatenate([kernel.reshape(FILTERS, -1).T, bias])
            total = total + softmax(features(filters, seen)[1] @ last)
        return total / len(draws[0])

    return predict


def network(seed: int, rate: float = 0.0, steps: int = 4000, draws: int = 200):
    """Predictions of an ordinary network of this size, with dropout before the last layer or without."""
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
        back = ((p @ weights[1].T) * mask).reshape(BATCH, FILTERS, -1)
        back = np.einsum("nfq,qp->npf", back, POOL) * (1 - units**2)
        found = [np.einsum("npi,npf->if", seen[rows], back), (pooled * mask).T @ p]
        # the norm's weight is that of a unit normal prior
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
    """All methods, one seed."""
    rows = []
    for method in ("mnf", "mean field"):
        approx, step = fit(model(), method, seed, DIGITS)
        posterior = approx.sample(300, random_seed=seed).posterior
        rows.append(judged(method, seed, predictions(posterior)) | {"ms a step": step})
    nets = [network(100 * seed + i) for i in range(5)]
    rows.append(judged("one network", seed, nets[0]))
    rows.append(judged("ensemble of 5", seed, lambda x: np.mean([n(x) for n in nets], axis=0)))
    rows.append(judged("dropout", seed, network(100 * seed, rate=DROPPED)))
    return rows


def report(rows: pd.DataFrame) -> str:
    """Write the table and what it comes to."""
    import machine

    def gain(column):
        by_seed = rows.pivot(index="seed", columns="method", values=column)
        gains = by_seed["mnf"] - by_seed["mean field"]
        return f"{gains.mean():.4f} ± {gains.std() / len(gains) ** 0.5:.4f}"

    return "\n".join(
        [
            "# Digits by a convolutional network",
            "",
            f"{TRAINED} images of the digits 0 to 7 to train on, in minibatches of {BATCH}, the others to test; "
            f"8 and 9 are the unknown classes. {FILTERS} filters of {SIZE} x {SIZE}, tanh units, means of two by "
            "two of them, classes; weights N(0, 1) a priori. Mean and standard error over seeds. Entropies in "
            f"nats, of at most {np.log(len(KNOWN)):.2f}; ece is the expected calibration error; auroc, how often "
            "the entropy of an unknown image is above that of a known one.",
            "",
            *table(rows),
            "",
            f"mnf less mean field, seed by seed: negative log likelihood {gain('nll')}, entropy of unknown "
            f"digits {gain('entropy, unknown')}, auroc {gain('auroc')}.",
            "",
            f"{machine.describe('jax')}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows += classifiers(seed)
        print(pd.DataFrame(rows[-5:]).round(4).to_string(), flush=True)
    text = report(pd.DataFrame(rows))
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
