"""Parts of all benchmarks of neural networks: fits by name, digits, scores, Adam and tables."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pymc as pm
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import pymc_flows as pmf

Predict = Callable[[np.ndarray], np.ndarray]

# Classes in the training data; the other digits are unknown.
KNOWN = range(8)
# Images in the training data.
TRAINED = 1000
# Images per minibatch.
BATCH = 100
# Fit options for digits.
DIGITS = {"n": 8000, "obj_n_mc": 2, "patience": 0, "learning_rate": 3e-3, "kl_warmup": 1000}
# Mnf with weights that are independent given the multipliers, as in the paper.
INDEPENDENT = "mnf, independent"
# Mnf with a multiplier for each weight.
EACH = "mnf, a multiplier a weight"
# Options of each kind of mnf.
MNF: dict[str, dict[str, Any]] = {
    "mnf": {},
    INDEPENDENT: {"correlated": False},
    EACH: {"multipliers": "weights"},
}
# Bins of confidence for the calibration error.
N_BINS = 10
# Smallest probability whose logarithm is taken.
TINY = 1e-12


def fit(
    model: pm.Model, method: str, seed: int, options: dict[str, Any]
) -> tuple[pmf.FlowApproximation, float]:
    """Fit by a method's name; return the fit and the milliseconds of a step.

    ``method`` is a kind of mnf, ``"flow"``, a family of groups for all variables together, or
    ``"each FAMILY"`` for a separate group for each variable.
    """
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


@functools.cache
def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Training and test images of known classes with labels, and images of unknown classes."""
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


def judged(method: str, seed: int, predict: Predict) -> dict[str, Any]:
    """Accuracy, negative log likelihood, calibration error and entropies of predictions."""
    _, (images, labels), unknown = digits()
    p, p_unknown = predict(images), predict(unknown)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.minimum((N_BINS * confidence).astype(int), N_BINS - 1)
    uncertain, uncertain_unknown = entropy(p), entropy(p_unknown)
    gaps = [
        (bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean())
        for b in np.unique(bins)
    ]
    return {
        "method": method,
        "seed": seed,
        "accuracy": right.mean(),
        "nll": -np.log(np.maximum(p[np.arange(len(labels)), labels], TINY)).mean(),
        "ece": sum(gaps),
        "entropy, known": uncertain.mean(),
        "entropy, unknown": uncertain_unknown.mean(),
        "auroc": roc_auc_score(
            np.repeat([0, 1], [len(p), len(p_unknown)]),
            np.concatenate([uncertain, uncertain_unknown]),
        ),
    }


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy (images,) of probabilities (images, classes), in nats."""
    return -(p * np.log(np.maximum(p, TINY))).sum(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits (rows, classes)."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def minimise(
    weights: list[np.ndarray],
    gradients: Callable[[list[np.ndarray]], list[np.ndarray]],
    steps: int,
    rate: float = 3e-3,
) -> list[np.ndarray]:
    """Weights after steps of Adam (Kingma & Ba 2015)."""
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


def about_digits(network: str) -> str:
    """Explain the table of a network's digits."""
    return (
        f"{TRAINED} images of the digits 0 to 7 to train on, in minibatches of {BATCH}, and the "
        f"others to test; 8 and 9 are the unknown classes. {network}, with prior N(0, 1) for each "
        f"weight. Entropies are in nats, at most {np.log(len(KNOWN)):.2f}; ece is the expected "
        "calibration error; auroc is how often the entropy of an unknown image exceeds that of a "
        "known one. Given the multipliers, weights of mnf are correlated, its default. They are "
        "independent, as in the paper, where the name says so or draws are local."
    )


def table(rows: pd.DataFrame) -> list[str]:
    """Markdown: mean and standard error over seeds, a line for each method."""
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
    """Differences between mnf and mean field, paired by seed, a line for each kind of mnf."""

    def difference(method: str, column: str) -> str:
        by_seed = rows.pivot(index="seed", columns="method", values=column)
        found = by_seed[method] - by_seed["mean field"]
        se = found.std() / len(found) ** 0.5 if len(found) > 1 else np.nan
        return f"{found.mean():.4f} ± {se:.4f}"

    return [
        f"{method} minus mean field, paired by seed: negative log likelihood "
        f"{difference(method, 'nll')}, entropy of unknown digits "
        f"{difference(method, 'entropy, unknown')}, auroc {difference(method, 'auroc')}.\n"
        for method in ("mnf", INDEPENDENT)
    ]


def command(
    description: str | None,
    make: Callable[[argparse.Namespace], str],
    **more: tuple[Any, str],
) -> None:
    """Read the command line, make the report, print it and write it.

    ``more`` maps further options to their default and meaning.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    for name, (default, meaning) in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--output", type=Path, help="file for the tables")
    options = parser.parse_args()
    started = time.perf_counter()
    text = make(options)
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.output:
        options.output.write_text(text)
