"""Reference values of neural flows, computed by libraries that need PyTorch.

They are committed, so that the tests do not need PyTorch. In an environment with torch, pyro-ppl,
normflows and zuko::

    python tests/bijections/peers/make_neural.py
"""

import sys
from importlib.metadata import version
from pathlib import Path

import normflows
import numpy as np
import torch
import zuko
from pyro.distributions.transforms import BlockAutoregressive, NeuralAutoregressive

HERE = Path(__file__).parent
DRAWS = 12


def arrays(**tensors):
    return {
        name: value.detach().numpy() if torch.is_tensor(value) else np.asarray(value)
        for name, value in tensors.items()
    }


def save(library, package, cases):
    parts = {
        f"{case}_{name}": array for case, all_ in cases.items() for name, array in all_.items()
    }
    np.savez_compressed(HERE / f"{library}_neural.npz", version=version(package), **parts)


def sigmoidal(rng, dim=3, n_units=4):
    """Pyro's deep sigmoidal flow, with parameters given for each draw."""
    z = torch.tensor(rng.normal(size=(DRAWS, dim)))
    raw = torch.tensor(rng.normal(size=(3, DRAWS, n_units, dim)))  # slopes, weights, shifts
    peer = NeuralAutoregressive(lambda z: tuple(raw), hidden_units=n_units, activation="sigmoid")
    peer.eps = 0.0
    x = peer._call(z)
    return arrays(z=z, slopes=raw[0], weights=raw[1], shifts=raw[2], x=x,
                  log_det=peer.log_abs_det_jacobian(z, x))  # fmt: skip


def block(rng, dim=3, hidden=(4, 2)):
    """Pyro's block neural autoregressive flow with its gated residual."""
    sys.modules[
        BlockAutoregressive.__module__
    ].eps = 0.0  # added where its logarithms and roots might meet a zero
    peer = BlockAutoregressive(dim, list(hidden), activation="tanh", residual="gated")
    for weight in peer.parameters():
        weight.data = torch.tensor(0.7 * rng.normal(size=weight.shape))
    z = torch.tensor(rng.normal(size=(DRAWS, dim)))
    x = peer._call(z)
    found = arrays(z=z, x=x, log_det=peer.log_abs_det_jacobian(z, x), gate=peer.gate)
    for i, layer in enumerate(peer.layers):
        found |= arrays(
            **{f"w{i}": layer._weight, f"log_norm{i}": layer._diag_weight, f"b{i}": layer.bias}
        )
    return found


def residual(rng, dim=2, width=5):
    """A residual block of normflows; the log-determinant comes from its full Jacobian."""
    swish = normflows.nets.lipschitz.Swish()
    net = torch.nn.Sequential(torch.nn.Linear(dim, width), swish, torch.nn.Linear(width, dim))
    net = net.double()
    for weight in net.parameters():
        weight.data = torch.tensor(0.2 * rng.normal(size=weight.shape))
    peer = normflows.flows.Residual(net, reverse=False, reduce_memory=False, brute_force=True)
    z = torch.tensor(rng.normal(size=(DRAWS, dim)), requires_grad=True)
    # the block subtracts its log-determinant from its argument; the wrapper reverses the sign
    x, log_det = peer.forward(z)
    return arrays(z=z, x=x, log_det=log_det, w0=net[0].weight.T, b0=net[0].bias,
                  beta=swish.beta, w1=net[2].weight.T, b1=net[2].bias)  # fmt: skip


def continuous(rng, dim=3, width=5):
    """Zuko's free-form flow of the same velocity, solved adaptively with a small tolerance."""
    w0, w1 = (torch.tensor(0.6 * rng.normal(size=s)) for s in ((dim, width), (width, dim)))
    b, c = (torch.tensor(rng.normal(size=width)) for _ in range(2))
    peer = zuko.transforms.FreeFormJacobianTransform(
        lambda t, z: torch.tanh(z @ w0 + b + t * c) @ w1, atol=1e-12, rtol=1e-12
    )
    z = torch.tensor(rng.normal(size=(DRAWS, dim)))
    x, log_det = peer.call_and_ladj(z)
    return arrays(z=z, x=x, log_det=log_det, w0=w0, w1=w1, b=b, c=c)


def main():
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(11)
    save("pyro", "pyro-ppl", {"sigmoidal": sigmoidal(rng), "block": block(rng)})
    save("normflows", "normflows", {"residual": residual(rng)})
    save("zuko", "zuko", {"continuous": continuous(rng)})


if __name__ == "__main__":
    main()
