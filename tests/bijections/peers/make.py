"""Write outputs of other libraries' layers at random weights and draws for test_peers.py.

It runs in a separate environment, because the project needs none of these libraries::

    python3.11 -m venv peers && peers/bin/pip install -r tests/bijections/peers/requirements.txt
    peers/bin/python tests/bijections/peers/make.py

A case is a layer: its weights under the library's names, inputs ``z`` (draws, dim), outputs ``x``
(draws, dim) and ``log_det`` (draws,). Nothing here repeats a layer's formula.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
DIM, N_KEPT, HIDDEN, DRAWS = 5, 2, 8, 16
N_BINS, BOUND = 4, 3.0


def randomised(module):
    """Set every weight of a module to a random normal number."""
    for weight in module.parameters():
        weight.data.normal_()
    return module


def perceptron(n_in, n_out):
    """Build a perceptron of PyTorch with one tanh layer."""
    layers = (torch.nn.Linear(n_in, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, n_out))
    return torch.nn.Sequential(*layers)


class WithoutContext(torch.nn.Module):
    """A network that accepts nflows' context and ignores it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = perceptron(n_in, n_out)

    def forward(self, kept, context=None):
        return self.net(kept)


def case(module, z, x, log_det, **more):
    """Weights, inputs, outputs and log-determinants as arrays."""
    arrays = {name: weight.detach().numpy() for name, weight in module.state_dict().items()}
    outcome = {"z": z, "x": x, "log_det": torch.as_tensor(log_det).expand(len(z)), **more}
    return arrays | {name: torch.as_tensor(a).detach().numpy() for name, a in outcome.items()}


def noise(scale=1.0):
    """Draws of the base noise."""
    return scale * torch.randn(DRAWS, DIM)


def nflows_cases():
    """Layers of nflows (MIT), by the authors of neural spline flows."""
    from nflows import transforms
    from nflows.transforms.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform as AutoregressiveSpline,
    )

    mask = [0] * N_KEPT + [1] * (DIM - N_KEPT)
    spline = {"num_bins": N_BINS, "tails": "linear", "tail_bound": BOUND}
    modules = {
        "lu": transforms.LULinear(DIM),
        "nice": transforms.AdditiveCouplingTransform(mask, WithoutContext),
        "spline_coupling": transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, WithoutContext, **spline
        ),
        "spline_autoregressive": AutoregressiveSpline(
            DIM, HIDDEN, num_blocks=0, use_residual_blocks=False, activation=torch.tanh, **spline
        ),
    }
    for name, module in modules.items():
        z = noise(1.5)
        yield name, case(randomised(module), z, *module(z))


def normflows_cases():
    """Layers of normflows (MIT)."""
    from normflows import flows

    coupling = randomised(
        flows.AffineCoupling(perceptron(N_KEPT, 2 * (DIM - N_KEPT)), scale_map="exp")
    )
    z = noise()
    parts, log_det = coupling([z[:, :N_KEPT], z[:, N_KEPT:]])
    yield "realnvp", case(coupling, z, torch.cat(parts, dim=1), log_det)

    convolution = flows.Invertible1x1Conv(DIM, use_lu=True)
    randomised(convolution)  # all but the permutation
    convolution.sign_S.fill_(1.0)  # the convolution keeps the signs of its initial rotation
    x, log_det = convolution.inverse(z[:, :, None, None])
    yield "lu", case(convolution, z, x[:, :, 0, 0], log_det)

    normalisation = randomised(flows.ActNorm(DIM))
    normalisation.data_dep_init_done.fill_(1.0)  # the random weights stay
    x, log_det = normalisation(z)
    yield "actnorm", case(normalisation, z, x, log_det)


def pyro_cases():
    """Layers of Pyro (Apache-2.0)."""
    from pyro.distributions import transforms
    from pyro.nn import AutoRegressiveNN

    network = AutoRegressiveNN(
        DIM, [HIDDEN], permutation=torch.arange(DIM), nonlinearity=torch.nn.Tanh()
    )
    modules = {
        "planar": transforms.Planar(DIM),
        "radial": transforms.Radial(DIM),
        "householder": transforms.Householder(DIM, 3),
        "iaf": transforms.AffineAutoregressive(
            network, log_scale_min_clip=-1e3, log_scale_max_clip=1e3
        ),
    }
    for name, module in modules.items():
        z = noise()
        x = randomised(module)(z)
        yield name, case(module, z, x, module.log_abs_det_jacobian(z, x))

    # Pyro multiplies by Q and R from the right in both places. This is neither the paper's form nor
    # the map of its log-determinant, unless Q is the identity, which two equal reflections give.
    # For other Q, the test applies Q around the layer, as in the paper. Pyro adds 1e-8 to each
    # determinant, and autodiff does not.
    bend, turn = (
        randomised(transforms.Sylvester(DIM, 2)),
        randomised(transforms.Sylvester(DIM, DIM)),
    )
    bend.u_unnormed.data[1] = bend.u_unnormed.data[0]
    for name, q, more in (
        ("sylvester_triangular", torch.eye(DIM), {}),
        ("sylvester_householder", turn.Q(z).detach(), {"reflections": turn.u_unnormed}),
    ):
        z = noise()

        def turned(one, q=q):
            return one + (bend._call(one @ q) - one @ q) @ q.T

        jacobians = torch.stack([torch.autograd.functional.jacobian(turned, one) for one in z])
        x, log_det = turned(z), torch.linalg.slogdet(jacobians).logabsdet
        yield name, case(bend, z, x, log_det, **more)


def tfp_cases():
    """TensorFlow Probability's masked autoregressive bijector (Apache-2.0), on Pyro's network."""
    import tensorflow_probability.substrates.numpy as tfp
    from pyro.nn import AutoRegressiveNN

    network = AutoRegressiveNN(
        DIM, [HIDDEN], permutation=torch.arange(DIM), nonlinearity=torch.nn.Tanh()
    )
    for weight in network.parameters():
        weight.data.normal_(std=0.3)

    def shift_and_log_scale(x):
        return tuple(out.detach().numpy() for out in network(torch.tensor(x)))

    bijector = tfp.bijectors.MaskedAutoregressiveFlow(shift_and_log_scale)
    z = noise()
    x = bijector.forward(z.numpy())
    yield "maf", case(network, z, x, -bijector.inverse_log_det_jacobian(x, event_ndims=1))


LIBRARIES = {
    "nflows": nflows_cases,
    "normflows": normflows_cases,
    "pyro-ppl": pyro_cases,
    "tensorflow-probability": tfp_cases,
}


def main() -> None:
    """Write one file per library."""
    torch.set_default_dtype(torch.float64)
    for library in sys.argv[1:] or LIBRARIES:
        torch.manual_seed(5)
        arrays = {
            f"{name}/{part}": array
            for name, parts in LIBRARIES[library]()
            for part, array in parts.items()
        }
        np.savez(HERE / f"{library}.npz", version=np.array(version(library)), **arrays)


if __name__ == "__main__":
    main()
