"""Multiplicative normalizing flows on small networks (Louizos & Welling 2017, section 4).

Toy regression: 20 points, y = x³ + noise of sd 3, and a network with one hidden layer. Predictive
standard deviations over x in [-6, 6] are compared with those of long NUTS. Digits of
scikit-learn: a classifier of eight classes, with the other two held out as unknown. ::

    python -m benchmarks.neural_networks --output benchmarks/results/neural_networks.md

``--seeds 1`` gives a first impression; ``--draws 500`` shortens NUTS.
"""

from __future__ import annotations

import argparse
import resource
import warnings

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from sklearn.neural_network import MLPClassifier

from benchmarks.machine import describe
from benchmarks.networks import (
    BATCH,
    DIGITS,
    EACH,
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

# Standard deviation of the toy's noise.
NOISE = 3.0
# Hidden units of the toy's small network, whose weights one flow can fit together.
UNITS = 20
# Hidden units of the toy's wide network, as in the paper.
WIDE = 100
# Inputs at which predictions are compared.
GRID = np.linspace(-6, 6, 61)
# Fit options for the toy.
TOY = {"n": 6000, "obj_n_mc": 16, "patience": 0}
# Hidden units of the classifier.
HIDDEN = 50
# Methods for the toy. Groups for each matrix are more flexible than multipliers of its rows; the
# last two methods fit all weights together.
METHODS = {
    "mnf": "mnf",
    INDEPENDENT: INDEPENDENT,
    EACH: EACH,
    "mean field": "mean field",
    "a Gaussian a matrix": "each full_rank",
    "a RealNVP a matrix": "each realnvp",
    "Gaussian of all weights": "full_rank",
    "flow of all weights": "flow",
}
# Methods for the wide network. A fit of all its 301 weights has a low-rank affine map.
WIDE_METHODS = {name: METHODS[name] for name in ("mnf", "mean field", "flow of all weights")}
# Mnf that samples the products per row of the data instead of one matrix for all rows.
LOCAL = "mnf, local draws"


def toy_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """20 points of Hernández-Lobato & Adams 2015, as in the paper."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-4, 4, 20)
    return x, x**3 + NOISE * rng.normal(size=20)


def toy_features(x: np.ndarray) -> np.ndarray:
    """Inputs near 1, and a column for the biases."""
    return np.stack([x / 4, np.ones_like(x)], axis=1)


def toy_output(x, first, last, maximum, ones):
    """Outputs of the network, scaled to y."""
    hidden = maximum(toy_features(x) @ first, 0)
    return 64 / first.shape[-1] ** 0.5 * (ones(hidden) @ last)[..., 0]


def toy_model(x: np.ndarray, y: np.ndarray, units: int = UNITS) -> pm.Model:
    """A network with one hidden layer; its biases are a row of each matrix."""
    with pm.Model() as model:
        first = pm.Normal("first", shape=(2, units))
        last = pm.Normal("last", shape=(units + 1, 1))
        mean = toy_output(
            x, first, last, pt.maximum,
            lambda h: pt.concatenate([h, np.ones((len(x), 1))], axis=1),
        )  # fmt: skip
        pm.Normal("y", mean, NOISE, observed=y)
    return model


def toy_curves(posterior: xr.Dataset) -> np.ndarray:
    """Curves (draws, grid) of posterior draws."""
    first, last = (
        posterior[name].values.reshape(-1, *posterior[name].shape[-2:])
        for name in ("first", "last")
    )
    return toy_output(
        GRID, first, last, np.maximum,
        lambda h: np.concatenate([h, np.ones((*h.shape[:-1], 1))], axis=-1),
    )  # fmt: skip


def toy_log_sd(posterior: xr.Dataset) -> np.ndarray:
    """Log predictive standard deviation of y over the grid."""
    return 0.5 * np.log(toy_curves(posterior).var(axis=0) + NOISE**2)


def nuts(model: pm.Model, draws: int) -> xr.Dataset:
    """Long NUTS, by nutpie."""
    import nutpie

    compiled = nutpie.compile_pymc_model(model)
    return nutpie.sample(
        compiled, draws=draws, tune=1000, chains=4, seed=1, progress_bar=False
    ).posterior


def toy(seeds: int, draws: int, units: int, methods: dict[str, str]) -> pd.DataFrame:
    """Error of the log predictive sd of each method and seed."""
    x, y = toy_data()
    model = toy_model(x, y, units)
    posterior = nuts(model, draws)
    truth = toy_log_sd(posterior)
    chains = [toy_log_sd(posterior.isel(chain=c)) for c in range(4)]
    rows = [
        {"method": "NUTS, one chain against all", "seed": c + 1, "error": rms(chain - truth)}
        for c, chain in enumerate(chains)
    ]
    for label, method in methods.items():
        for seed in range(1, seeds + 1):
            approx, _ = fit(model, method, seed, TOY)
            found = approx.sample(4000, random_seed=seed)
            elbo = (found.sample_stats.log_p - found.sample_stats.log_q).mean()
            error = rms(toy_log_sd(found.posterior) - truth)
            rows.append({"method": label, "seed": seed, "error": error, "ELBO": float(elbo)})
    return pd.DataFrame(rows)


def rms(difference: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(difference**2)))


def digits_model() -> pm.Model:
    """One hidden layer of tanh units, on minibatches."""
    (images, labels), _, _ = digits()
    # PyMC would cast wider integers, and would not recognise the cast as data
    batch, answers = pm.Minibatch(images, labels.astype("int32"), batch_size=BATCH)
    with pm.Model() as model:
        first = pm.Normal("first", shape=(images.shape[1], HIDDEN))
        last = pm.Normal("last", shape=(HIDDEN, len(KNOWN)))
        logits = pt.tanh(batch @ first) @ last
        pm.Categorical("label", logit_p=logits, observed=answers, total_size=len(labels))
    return model


def probabilities(posterior: xr.Dataset, images: np.ndarray) -> np.ndarray:
    """Predictive probabilities (images, classes), averaged over draws."""
    total = 0.0
    first, last = posterior["first"].values[0], posterior["last"].values[0]
    for one, two in zip(first, last, strict=True):
        logits = np.tanh(images @ one) @ two
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        total = total + odds / odds.sum(axis=1, keepdims=True)
    return total / len(first)


def networks(seed: int, n: int) -> list[MLPClassifier]:
    """Ordinary networks of the same size, trained from different initial weights."""
    (images, labels), _, _ = digits()
    found = []
    for i in range(n):
        net = MLPClassifier((HIDDEN,), activation="tanh", max_iter=300, random_state=100 * seed + i)
        with warnings.catch_warnings():
            # the warning that 300 steps may not suffice does not matter here
            warnings.simplefilter("ignore")
            found.append(net.fit(images, labels))
    return found


def dropout(seed: int, rate: float = 0.3, steps: int = 4000, draws: int = 200) -> Predict:
    """A network that is trained and used with dropout (Gal & Ghahramani 2016)."""
    (images, labels), _, _ = digits()
    rng = np.random.default_rng(seed)
    n_in = images.shape[1]

    def gradients(weights):
        rows = rng.choice(len(images), BATCH, replace=False)
        mask = (rng.random((BATCH, HIDDEN)) > rate) / (1 - rate)
        hidden = np.tanh(images[rows] @ weights[0])
        p = softmax((hidden * mask) @ weights[1])
        p[np.arange(BATCH), labels[rows]] -= 1
        back = (p @ weights[1].T) * mask * (1 - hidden**2)
        found = [images[rows].T @ back / BATCH, (hidden * mask).T @ p / BATCH]
        # the weight decay is that of a unit normal prior
        return [g + w / len(images) for g, w in zip(found, weights, strict=True)]

    first = rng.normal(size=(n_in, HIDDEN)) / n_in**0.5
    last = rng.normal(size=(HIDDEN, len(KNOWN))) / HIDDEN**0.5
    weights = minimise([first, last], gradients, steps)

    def predict(x):
        hidden = np.tanh(x @ weights[0])
        masks = np.random.default_rng(seed).random((draws, 1, HIDDEN)) > rate
        return np.mean([softmax((hidden * m / (1 - rate)) @ weights[1]) for m in masks], axis=0)

    return predict


def classifiers(seeds: int) -> pd.DataFrame:
    """Scores of all methods on the digits."""
    rows = []
    for seed in range(1, seeds + 1):
        for method in ("mnf", INDEPENDENT, LOCAL, "mean field"):
            options = DIGITS | {"local_reparameterization": method == LOCAL}
            name = INDEPENDENT if method == LOCAL else method
            approx, step = fit(digits_model(), name, seed, options)
            posterior = approx.sample(300, random_seed=seed).posterior
            row = judged(method, seed, lambda x, p=posterior: probabilities(p, x))
            rows.append(row | {"ms a step": step})
        nets = networks(seed, 5)
        rows.append(judged("one network", seed, nets[0].predict_proba))

        def ensemble(x: np.ndarray, nets: list[MLPClassifier] = nets) -> np.ndarray:
            return np.mean([net.predict_proba(x) for net in nets], axis=0)

        rows.append(judged("ensemble of 5", seed, ensemble))
        rows.append(judged("dropout", seed, dropout(seed)))
    return pd.DataFrame(rows)


def below_mean_field(rows: pd.DataFrame, methods: dict[str, str]) -> str:
    """Relative reduction of the toy's errors from mean field's."""
    error = rows.groupby("method")["error"].mean()
    less = [f"{1 - error[m] / error['mean field']:.0%} ({m})" for m in methods if m != "mean field"]
    return f"Errors are lower than mean field's by {', '.join(less)}."


def report(
    regression: pd.DataFrame, wide: pd.DataFrame, classification: pd.DataFrame, peak: float
) -> str:
    """Write the tables and their explanation; ``peak`` is the peak memory in GiB."""
    step = classification.groupby("method")["ms a step"].mean()
    cost = {method: f"{step[method] / step['mean field']:.1f}" for method in ("mnf", INDEPENDENT)}
    return "\n".join(
        [
            "# Neural networks",
            "",
            "## Toy regression",
            "",
            f"20 points, y = x³ + noise, {UNITS} hidden units. Root mean square error, over x in "
            "[-6, 6], of the log predictive standard deviation against NUTS, mean and standard "
            "error over seeds. In mnf, each row of a matrix has a multiplier. Given the "
            "multipliers, weights are correlated, or independent as in the paper. With a "
            "multiplier for each weight, one flow has the multipliers of both matrices. The last "
            "two methods fit all weights together.",
            "",
            *table(regression),
            "",
            below_mean_field(regression, METHODS),
            "",
            f"The same with {WIDE} hidden units.",
            "",
            *table(wide),
            "",
            below_mean_field(wide, WIDE_METHODS),
            "",
            "## Digits",
            "",
            about_digits(f"{HIDDEN} hidden units"),
            "",
            *table(classification),
            "",
            *against_mean_field(classification),
            f"A step of {DIGITS['obj_n_mc']} draws of mnf takes {cost['mnf']} times as long as "
            f"one of mean field; with independent weights, {cost[INDEPENDENT]} times. Peak memory "
            f"of all fits to digits: {peak:.1f} GiB.",
            "",
            f"{describe('jax', 'scikit-learn')}.",
            "",
        ]
    )


def main() -> None:
    def make(options: argparse.Namespace) -> str:
        seeds, draws = options.seeds, options.draws
        # the digits come first, so that the peak memory is theirs
        classification = classifiers(seeds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        narrow, wide = toy(seeds, draws, UNITS, METHODS), toy(seeds, draws, WIDE, WIDE_METHODS)
        return report(narrow, wide, classification, peak)

    command(__doc__, make, draws=(4000, "draws of each chain of NUTS"))


if __name__ == "__main__":
    main()
