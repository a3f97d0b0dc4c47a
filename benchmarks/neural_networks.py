"""Multiplicative normalizing flows on small networks (Louizos & Welling 2017, section 4).

Toy regression: 20 points, y = x³ + noise of sd 3, a network of one hidden layer, predictive standard
deviations over x in [-6, 6] against long NUTS. Digits of scikit-learn: a classifier of eight classes,
with the other two held out as unknown. ::

    python -m benchmarks.neural_networks --output benchmarks/results/neural_networks.md

``--seeds 1`` is a first look; ``--draws 500`` shortens NUTS.
"""

from __future__ import annotations

import argparse
import functools
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pymc as pm
import pytensor.tensor as pt
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

import pymc_flows as pmf
from benchmarks.machine import describe

# hidden units of the toy's networks: one that is small enough to fit whole, and one as wide as the paper's
NOISE, UNITS, WIDE = 3.0, 20, 100
GRID = np.linspace(-6, 6, 61)
TOY = {"n": 6000, "obj_n_mc": 16, "patience": 0}
KNOWN, UNKNOWN = range(8), (8, 9)
HIDDEN, BATCH, TRAINED = 50, 100, 1000
DIGITS = {"n": 8000, "obj_n_mc": 2, "patience": 0, "learning_rate": 3e-3, "kl_warmup": 1000}
# Weights that are independent given the multipliers, as in the paper; and multipliers of weights.
INDEPENDENT, EACH = "mnf, independent", "mnf, a multiplier a weight"
MNF = {"mnf": {}, INDEPENDENT: {"correlated": False}, EACH: {"multipliers": "weights"}}
# The toy's. What fits each matrix apart can do more than multipliers of its rows; others fit all weights together.
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
# Of a wide network these; a fit of all 301 weights is low-rank in its affine map.
WIDE_METHODS = {name: METHODS[name] for name in ("mnf", "mean field", "flow of all weights")}
# Of the digits': products drawn anew for each row of the data, in place of one matrix for all.
LOCAL = "mnf, local draws"


def toy_data(seed: int = 0):
    """20 points of Hernández-Lobato & Adams 2015, as the paper takes them."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-4, 4, 20)
    return x, x**3 + NOISE * rng.normal(size=20)


def toy_features(x):
    """Inputs near 1, and a column for the biases."""
    return np.stack([x / 4, np.ones_like(x)], axis=1)


def toy_output(x, first, last, maximum, ones):
    """Output of the network, scaled to y."""
    hidden = maximum(toy_features(x) @ first, 0)
    return 64 / first.shape[-1] ** 0.5 * (ones(hidden) @ last)[..., 0]


def toy_model(x, y, units: int = UNITS) -> pm.Model:
    """One hidden layer; biases are a row of each matrix."""
    with pm.Model() as model:
        first = pm.Normal("first", shape=(2, units))
        last = pm.Normal("last", shape=(units + 1, 1))
        mean = toy_output(
            x, first, last, pt.maximum,
            lambda h: pt.concatenate([h, np.ones((len(x), 1))], axis=1),
        )  # fmt: skip
        pm.Normal("y", mean, NOISE, observed=y)
    return model


def toy_curves(posterior) -> np.ndarray:
    """Curves (draws, grid) of a posterior's draws."""
    first, last = (
        posterior[name].values.reshape(-1, *posterior[name].shape[-2:])
        for name in ("first", "last")
    )
    return toy_output(
        GRID, first, last, np.maximum,
        lambda h: np.concatenate([h, np.ones((*h.shape[:-1], 1))], axis=-1),
    )  # fmt: skip


def toy_log_sd(posterior) -> np.ndarray:
    """Log predictive standard deviation of y over the grid."""
    return 0.5 * np.log(toy_curves(posterior).var(axis=0) + NOISE**2)


def nuts(model, draws: int):
    """Long NUTS, by nutpie."""
    import nutpie

    compiled = nutpie.compile_pymc_model(model)
    return nutpie.sample(
        compiled, draws=draws, tune=1000, chains=4, seed=1, progress_bar=False
    ).posterior


def fit(model, method: str, seed: int, options: dict):
    """Fit by a method's name; how long a step took, in ms, without compilation."""
    with model:
        if method in MNF:
            inference = pmf.NFVI("mnf", random_seed=seed, **MNF[method])
        elif method == "flow":
            inference = pmf.NFVI(method, random_seed=seed)
        elif method.startswith("each "):
            groups = [pm.Group([rv], vfam=method.removeprefix("each ")) for rv in model.free_RVs]
            inference = pmf.NFVI(groups, random_seed=seed)
        else:
            vfam = method.replace(" ", "_")
            inference = pmf.NFVI([pm.Group(None, vfam=vfam)], random_seed=seed)
        approx = inference.fit(initialize=False, progressbar=False, **options)
    seconds = approx.fit_stats["seconds"]["training"]
    return approx, 1000 * seconds / approx.fit_stats["steps"]


def toy(seeds: int, draws: int, units: int, methods: dict) -> pd.DataFrame:
    """Error of the log predictive sd of each method and seed."""
    x, y = toy_data()
    model = toy_model(x, y, units)
    posterior = nuts(model, draws)
    truth = toy_log_sd(posterior)
    halves = [toy_log_sd(posterior.isel(chain=c)) for c in range(4)]
    rows = [{"method": "NUTS, one chain against all", "seed": c + 1, "error": rms(half - truth)} for c, half in enumerate(halves)]  # fmt: skip
    for label, method in methods.items():
        for seed in range(1, seeds + 1):
            approx, _ = fit(model, method, seed, TOY)
            found = approx.sample(4000, random_seed=seed)
            elbo = (found.sample_stats.log_p - found.sample_stats.log_q).mean()
            error = rms(toy_log_sd(found.posterior) - truth)
            rows.append({"method": label, "seed": seed, "error": error, "ELBO": float(elbo)})
    return pd.DataFrame(rows)


def rms(difference) -> float:
    return float(np.sqrt(np.mean(difference**2)))


@functools.cache
def digits():
    """Training and test images of the known classes, with labels, and images of the unknown."""
    images, labels = load_digits(return_X_y=True)
    images = np.column_stack([images / 16 - 0.3, np.ones(len(images))])
    known = labels < len(KNOWN)
    order = np.random.default_rng(0).permutation(known.sum())
    images_known, labels_known = images[known][order], labels[known][order]
    return (
        (images_known[:TRAINED], labels_known[:TRAINED]),
        (images_known[TRAINED:], labels_known[TRAINED:]),
        images[~known],
    )


def digits_model() -> pm.Model:
    """One hidden layer of tanh units, on minibatches."""
    (images, labels), _, _ = digits()
    # a batch of longer integers would be cast, and what is cast PyMC does not take for data
    batch, answers = pm.Minibatch(images, labels.astype("int32"), batch_size=BATCH)
    with pm.Model() as model:
        first = pm.Normal("first", shape=(images.shape[1], HIDDEN))
        last = pm.Normal("last", shape=(HIDDEN, len(KNOWN)))
        logits = pt.tanh(batch @ first) @ last
        pm.Categorical("label", logit_p=logits, observed=answers, total_size=len(labels))
    return model


def probabilities(posterior, images) -> np.ndarray:
    """Predictive probabilities (images, classes), averaged over draws."""
    total = 0.0
    first, last = posterior["first"].values[0], posterior["last"].values[0]
    for one, two in zip(first, last, strict=True):
        logits = np.tanh(images @ one) @ two
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        total = total + odds / odds.sum(axis=1, keepdims=True)
    return total / len(first)


def judged(method: str, seed: int, predict) -> dict:
    """Accuracy, negative log likelihood, calibration error and entropies of predictions."""
    _, (images, labels), unknown = digits()
    p, p_unknown = predict(images), predict(unknown)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.minimum((10 * confidence).astype(int), 9)
    uncertain, uncertain_unknown = entropy(p), entropy(p_unknown)
    gaps = [
        (bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean())
        for b in np.unique(bins)
    ]
    return {
        "method": method,
        "seed": seed,
        "accuracy": right.mean(),
        "nll": -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-12)).mean(),
        "ece": sum(gaps),
        "entropy, known": uncertain.mean(),
        "entropy, unknown": uncertain_unknown.mean(),
        "auroc": roc_auc_score(
            np.repeat([0, 1], [len(p), len(p_unknown)]),
            np.concatenate([uncertain, uncertain_unknown]),
        ),
    }


def entropy(p) -> np.ndarray:
    """Entropy (images,) of probabilities (images, classes), in nats."""
    return -(p * np.log(np.maximum(p, 1e-12))).sum(axis=1)


def networks(seed: int, n: int) -> list:
    """Ordinary networks of the same size, trained from different weights."""
    (images, labels), _, _ = digits()
    found = []
    for i in range(n):
        net = MLPClassifier((HIDDEN,), activation="tanh", max_iter=300, random_state=100 * seed + i)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that the steps were not enough, which is no matter here
            found.append(net.fit(images, labels))
    return found


def minimise(weights: list, gradients, steps: int, rate: float = 3e-3) -> list:
    """Weights after steps of Adam; ``gradients`` gives those of a list of weights."""
    memory = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    for step in range(1, steps + 1):
        rate_now = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for i, gradient in enumerate(gradients(weights)):
            first, second = memory[i]
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            memory[i] = first, second
            weights[i] = weights[i] - rate_now * first / (np.sqrt(second) + 1e-8)
    return weights


def dropout(seed: int, rate: float = 0.3, steps: int = 4000, draws: int = 200):
    """Predictions of a network trained, and used, with dropout (Gal & Ghahramani 2016)."""
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
        # the norm's weight is that of a unit normal prior
        return [g + w / len(images) for g, w in zip(found, weights, strict=True)]

    first = rng.normal(size=(n_in, HIDDEN)) / n_in**0.5
    last = rng.normal(size=(HIDDEN, len(KNOWN))) / HIDDEN**0.5
    weights = minimise([first, last], gradients, steps)

    def predict(x):
        hidden = np.tanh(x @ weights[0])
        masks = np.random.default_rng(seed).random((draws, 1, HIDDEN)) > rate
        return np.mean([softmax((hidden * m / (1 - rate)) @ weights[1]) for m in masks], axis=0)

    return predict


def softmax(logits) -> np.ndarray:
    """Probabilities of logits (rows, classes)."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def classifiers(seeds: int) -> pd.DataFrame:
    """All methods on the digits."""
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
        rows.append(judged("ensemble of 5", seed, lambda x, ns=nets: np.mean([n.predict_proba(x) for n in ns], axis=0)))  # fmt: skip
        rows.append(judged("dropout", seed, dropout(seed)))
    return pd.DataFrame(rows)


def about_digits(network: str) -> str:
    """What the table of a network's digits shows."""
    return (
        f"{TRAINED} images of the digits 0 to 7 to train on, in minibatches of {BATCH}, the others to test; "
        f"8 and 9 are the unknown classes. {network}, weights N(0, 1) a priori; entropies in nats, of at most "
        f"{np.log(len(KNOWN)):.2f}; ece is the expected calibration error; auroc, how often the "
        "entropy of an unknown image is above that of a known one. Given the multipliers, weights of mnf are "
        "correlated, its default, or independent, as in the paper, where that is said or draws are local."
    )


def table(rows: pd.DataFrame) -> list[str]:
    """Mean and standard error over seeds, a line each method, as Markdown."""
    columns = [c for c in rows if c not in ("method", "seed")]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, group in rows.groupby("method", sort=False):
        cells = []
        for column in columns:
            values, places = group[column].dropna(), 1 if column == "ELBO" else 3
            text = f"{values.mean():.{places}f}" if len(values) else "-"
            if len(values) > 1:
                text += f" ± {values.std() / len(values) ** 0.5:.{places}f}"
            cells.append(text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def against_mean_field(rows: pd.DataFrame) -> list[str]:
    """What mnf's predictions have more than mean field's, seed by seed, a line each kind of mnf."""

    def more(method, column):
        by_seed = rows.pivot(index="seed", columns="method", values=column)
        found = by_seed[method] - by_seed["mean field"]
        se = found.std() / len(found) ** 0.5 if len(found) > 1 else np.nan
        return f"{found.mean():.4f} ± {se:.4f}"

    return [
        f"{method} less mean field, seed by seed: negative log likelihood {more(method, 'nll')}, entropy of "
        f"unknown digits {more(method, 'entropy, unknown')}, auroc {more(method, 'auroc')}.\n"
        for method in ("mnf", INDEPENDENT)
    ]


def below_mean_field(rows: pd.DataFrame, methods: dict) -> str:
    """By how much errors of the toy are lower than mean field's."""
    error = rows.groupby("method")["error"].mean()
    less = [f"{1 - error[m] / error['mean field']:.0%} ({m})" for m in methods if m != "mean field"]
    return f"Errors are lower than mean field's by {', '.join(less)}."


def report(
    regression: pd.DataFrame, wide: pd.DataFrame, classification: pd.DataFrame, peak: float
) -> str:
    """Write the tables and what they come to; peak memory in GiB."""
    step = classification.groupby("method")["ms a step"].mean()
    cost = {method: f"{step[method] / step['mean field']:.1f}" for method in ("mnf", INDEPENDENT)}
    return "\n".join(
        [
            "# Neural networks",
            "",
            "## Toy regression",
            "",
            f"20 points, y = x³ + noise, {UNITS} hidden units. Root mean square error, over x in "
            "[-6, 6], of the log predictive standard deviation against NUTS, mean and standard error "
            "over seeds. Of mnf, the rows of each matrix have multipliers, and its weights are correlated beyond "
            "that, or independent, as in the paper; or each weight has a multiplier, and those of both matrices "
            "go through one flow, as the weights of the last two methods do.",
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
            f"A step of {DIGITS['obj_n_mc']} draws takes mnf {cost['mnf']} times as long as mean field, mnf of "
            f"independent weights {cost[INDEPENDENT]} times. Peak memory of all fits to digits: {peak:.1f} GiB.",
            "",
            f"{describe('jax', 'scikit-learn')}.",
            "",
        ]
    )


def command(description: str, make: Callable[[argparse.Namespace], str], **more) -> None:
    """Read the command line, print the report that is made of it, and write it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    for name, (default, meaning) in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    text = make(options)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        options.output.write_text(text)


def main() -> None:
    def make(options):
        seeds, draws = options.seeds, options.draws
        # first, so that peak memory is of these
        classification = classifiers(seeds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        narrow, wide = toy(seeds, draws, UNITS, METHODS), toy(seeds, draws, WIDE, WIDE_METHODS)
        return report(narrow, wide, classification, peak)

    command(__doc__, make, draws=(4000, "of each chain of NUTS"))


if __name__ == "__main__":
    main()
