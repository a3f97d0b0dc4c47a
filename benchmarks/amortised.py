"""A small deep latent Gaussian model of scikit-learn's digits, with amortised inference.

The model follows Rezende & Mohamed 2015 (arXiv:1505.05770, section 6.2 and figure 4). It has two
layers of Gaussian latent variables and a decoder, trained jointly. A network maps each image to
the approximate posterior of its latent variables. The table shows the bound of test images for each
number of flow layers. ::

    python -m benchmarks.amortised --output benchmarks/results/amortised.md
"""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pymc as pm
import pytensor
import pytensor.tensor as pt
from sklearn.datasets import load_digits

import pymc_flows as pmf
from benchmarks.machine import describe

# Latent variables of the top layer.
TOP = 2
# Latent variables of the bottom layer.
BOTTOM = 6
# Hidden units of the decoder.
HIDDEN = 32
# Images per minibatch.
BATCH = 100
# Images that are held out for the test.
N_TEST = 397
# Draws of the latent variables of each test image.
DRAWS = 200
# Fit options.
FIT = {"n": 3000, "obj_n_mc": 4, "learning_rate": 3e-3, "patience": 0}
# Label of mean field.
MEAN_FIELD = "mean field"
# Label of each posterior, to its family and the family's options.
FLOWS = {
    MEAN_FIELD: ("scale", {}),
    **{f"planar, {k} layers": ("planar", {"n_layers": k}) for k in (4, 16)},
    **{f"iaf, {k} layers": ("iaf", {"n_layers": k}) for k in (1, 2, 4)},
}


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images (n, 64), black or white."""
    images = (load_digits().data >= 8).astype(float)
    images = images[np.random.default_rng(0).permutation(len(images))]
    return images[N_TEST:], images[:N_TEST]


def decoder(seed: int) -> dict:
    """Weights and biases of the two layers between the latent variables and the pixels."""
    rng = np.random.default_rng(seed)
    widths = {"between": (TOP, BOTTOM), "hidden": (BOTTOM, HIDDEN), "pixels": (HIDDEN, 64)}
    weights = {
        f"{name}_weights": rng.normal(size=shape) / shape[0] ** 0.5
        for name, shape in widths.items()
    }
    biases = {f"{name}_biases": np.zeros(n_out) for name, (_, n_out) in widths.items()}
    return {
        # without static shapes JAX warns that it skips checks of them
        name: pytensor.shared(value, name=name, shape=value.shape)
        for name, value in (weights | biases).items()
    }


def model(images, n: int, weights: dict) -> pm.Model:
    """The model of n images."""
    with pm.Model() as built:
        top = pm.Normal("top", shape=(n, TOP))
        mean = pt.tanh(top @ weights["between_weights"] + weights["between_biases"])
        bottom = pm.Normal("bottom", 2 * mean, 1, shape=(n, BOTTOM))
        hidden = pt.tanh(bottom @ weights["hidden_weights"] + weights["hidden_biases"])
        logits = hidden @ weights["pixels_weights"] + weights["pixels_biases"]
        pm.Bernoulli("pixels", logit_p=logits, observed=images, total_size=n)
    return built


def group(built: pm.Model, images, flow: tuple) -> pm.Group:
    """One flow for the latent variables of all images."""
    vfam, options = flow
    latent = [built["top"], built["bottom"]]
    return pm.Group(latent, vfam=vfam, context=images, model=built, **options)


def bound(flow: tuple, seed: int) -> dict[str, float]:
    """Train on minibatches; return the bound of a test image in nats and a step's milliseconds."""
    training, test = digits()
    weights = decoder(seed)
    batch = pm.Minibatch(training, batch_size=BATCH)
    built = model(batch, BATCH, weights)
    inference = pmf.NFVI([group(built, batch, flow)], model=built, random_seed=seed)
    approx = inference.fit(more_obj_params=list(weights.values()), progressbar=False, **FIT)
    stats = approx.fit_stats
    built = model(test, len(test), weights)
    fixed = pmf.FlowApproximation([group(built, test, flow)], model=built)
    fixed.params[0].set_value(approx.params[0].get_value())
    drawn = fixed.sample(DRAWS, random_seed=seed).sample_stats
    return {
        "bound": float((drawn["log_p"] - drawn["log_q"]).mean()) / len(test),
        "ms a step": 1000 * stats["seconds"]["training"] / stats["steps"],
    }


def report(results: pd.DataFrame, seeds: list[int]) -> str:
    """Write the table, its explanation and the settings."""
    lines = [
        "| posterior | bound, nats an image | gain on mean field | ms a step |",
        "|---" * 4 + "|",
    ]
    plain = results[results["flow"] == MEAN_FIELD].set_index("seed")["bound"]
    for flow in FLOWS:
        rows = results[results["flow"] == flow].set_index("seed")
        low, mean, high = rows["bound"].min(), rows["bound"].mean(), rows["bound"].max()
        gain = rows["bound"] - plain
        spread = f"{gain.mean():.2f} ({gain.min():.2f} to {gain.max():.2f})"
        cells = [
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            spread,
            f"{rows['ms a step'].median():.1f}",
        ]
        lines.append(f"| {flow} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    n_training, n_test = map(len, digits())
    return f"""# A deep latent Gaussian model, amortised

scikit-learn's digits, 8 x 8 pixels, black or white: {n_training} images to train on, {n_test} to
test. The model has {TOP} latent variables above {BOTTOM}, and a decoder with {HIDDEN} tanh
units that is trained jointly. One flow, conditioned on the image, serves all images. The bound is
log p(x) - KL of a test image, as in figure 4 of Rezende & Mohamed 2015: mean (smallest to largest)
over seeds {", ".join(map(str, seeds))}, each from {DRAWS} draws of every image's latent variables.

{table}

Each fit: `fit({", ".join(f"{k}={v}" for k, v in FIT.items())})`, minibatches of {BATCH}. The
weights of planar layers are the same for all images; only the affine map after them depends on the
image. Each iaf layer depends on the image.

{describe("pymc-flows", "jax", "scikit-learn")}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="os.fork")
    rows = []
    for seed in options.seeds:
        for name, flow in FLOWS.items():
            found = bound(flow, seed)
            rows.append({"seed": seed, "flow": name, **found})
            print(f"seed {seed}, {name}: {found['bound']:.2f} nats an image", flush=True)
    text = report(pd.DataFrame(rows), options.seeds)
    print(f"\n{text}")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
