"""Layers against other libraries with the same weights; peers/README.md lists the libraries.

``peers/make.py`` wrote the files with the peers' numbers. If a peer has another layout or
constraint of its weights, the tests translate the weights. The whole layer is compared:
conditioner, transformer and log-determinant. FlowJAX is called directly, in the other tests of this
folder.
"""

from pathlib import Path

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from conftest import PYTHON
from numpy.testing import assert_allclose

from pymc_flows.bijections import (
    LU,
    Additive,
    Affine,
    Chain,
    Coupling,
    Householder,
    InverseAutoregressive,
    Loc,
    MaskedAutoregressive,
    Params,
    Planar,
    Radial,
    RationalQuadratic,
    Scale,
    Sylvester,
    flatten,
)

N_BINS, BOUND = 4, 3.0
# with bounds this large, Andrade's soft clip is s = (2/π) raw, a factor that the weights can undo
UNCLIPPED = Affine(growth=1e9, shrinkage=1e9)
UNDO = np.pi / 2


def peer(library, name):
    """Weights of one of a library's layers, its input ``z`` and its outputs."""
    with np.load(Path(__file__).parent / "peers" / f"{library}.npz") as arrays:
        parts = {key: arrays[key] for key in arrays.files if key.startswith(f"{name}/")}
    return {key.removeprefix(f"{name}/"): array for key, array in parts.items()}


def flat(bijection, weights):
    """Concatenate the weights; each must have the layer's shape."""
    weights = {name: np.asarray(weights[name]) for name in bijection.weight_shapes}
    assert {name: w.shape for name, w in weights.items()} == bijection.weight_shapes
    return flatten(weights)


def evaluate(bijection, direction, given, weights):
    """Evaluate a layer: values and log-determinants."""
    x, symbolic = pt.matrix(shape=(None, bijection.dim)), pt.vector(shape=(bijection.n_weights,))
    outputs = getattr(bijection, direction)(x, Params(symbolic, bijection.weight_shapes))
    function = pytensor.function([x, symbolic], outputs, mode=PYTHON, on_unused_input="ignore")
    return function(given, flat(bijection, weights))


def compare(bijection, weights, theirs, order=lambda x: x):
    """Compare outputs, and our inverse with the peer's inputs; ``order`` reorders the peer's."""
    x, log_det = evaluate(bijection, "forward", theirs["z"], weights)
    assert_allclose(x, order(theirs["x"]), rtol=0, atol=1e-8)
    assert_allclose(log_det, theirs["log_det"], rtol=0, atol=1e-8)
    if bijection.invertible:
        z, log_det = evaluate(bijection, "inverse", order(theirs["x"]), weights)
        assert_allclose(z, theirs["z"], rtol=0, atol=1e-8)
        assert_allclose(log_det, -theirs["log_det"], rtol=0, atol=1e-8)


def halves(x):
    """Move the two kept elements, which peers return first, to the end."""
    return np.hstack([x[:, 2:], x[:, :2]])


def mirrored(x):
    """Reverse the elements, as our layers do."""
    return x[:, ::-1]


def dense(theirs, prefixes, masked=False):
    """Weights (n_in, n_out) and biases of a network's dense layers, from torch's (n_out, n_in)."""
    weights = {}
    for i, prefix in enumerate(prefixes):
        weight = theirs[f"{prefix}.weight"]
        if masked:
            weight = weight * theirs[f"{prefix}.mask"]
        weights |= {f"w{i}": weight.T.copy(), f"b{i}": theirs[f"{prefix}.bias"].copy()}
    return weights


def by_parameter(weights, n_params, last):
    """Reorder outputs from element by element to parameter by parameter."""
    w, b = weights[f"w{last}"], weights[f"b{last}"]
    w = w.reshape(len(w), -1, n_params).transpose(0, 2, 1).reshape(len(w), -1)
    return weights | {f"w{last}": w, f"b{last}": b.reshape(-1, n_params).T.ravel()}


def scaled(weights, start, factor, last):
    """Multiply the outputs from index ``start`` on by a factor."""
    for name in (f"w{last}", f"b{last}"):
        weights[name][..., start:] *= factor
    return weights


def without_offset(weights, n_elements, last):
    """Subtract the offset that only our layers add to slopes, so that raw 0 is slope 1."""
    offset = np.log(np.expm1(1 - 1e-3))
    weights[f"b{last}"][2 * N_BINS * n_elements :] -= offset
    return weights


# ------------------------------------------------------------------------------------- linear


def test_lu_agrees_with_nflows():
    """nflows has no permutation, s is a softplus plus 0.001, and there is a bias."""
    theirs = peer("nflows", "lu")
    factors = np.zeros((5, 5))
    factors[np.tril_indices(5, -1)] = theirs["lower_entries"]
    factors[np.triu_indices(5, 1)] = theirs["upper_entries"]
    s = np.logaddexp(0, theirs["unconstrained_upper_diag"]) + 1e-3
    weights = {"0.log_diagonal": np.log(s), "0.factors": factors, "1.loc": theirs["bias"]}
    compare(Chain([LU(5), Loc(5)]), weights, theirs)


def test_lu_agrees_with_the_convolution_of_glow_in_normflows():
    theirs = peer("normflows", "lu")
    order = tuple(theirs["P"].argmax(axis=1).tolist())
    factors = np.tril(theirs["L"], -1) + np.triu(theirs["U"], 1)
    weights = {"log_diagonal": theirs["log_S"], "factors": factors}
    assert order != tuple(range(5))
    compare(LU(5, order), weights, theirs)


def test_scale_and_loc_agree_with_actnorm_in_normflows():
    theirs = peer("normflows", "actnorm")
    weights = {"0.log_scale": theirs["s"][0], "1.loc": theirs["t"][0]}
    compare(Chain([Scale(5), Loc(5)]), weights, theirs)


def test_householder_agrees_with_pyro():
    theirs = peer("pyro-ppl", "householder")
    weights = {f"{i}.v": v for i, v in enumerate(theirs["u_unnormed"])}
    compare(Chain([Householder(5)] * 3), weights, theirs)


# ------------------------------------------------------------------ planar, radial, Sylvester


def test_planar_agrees_with_pyro():
    theirs = peer("pyro-ppl", "planar")
    weights = {"u": theirs["u"], "w": theirs["w"], "b": theirs["bias"][0]}
    compare(Planar(5), weights, theirs)


def test_radial_agrees_with_pyro():
    theirs = peer("pyro-ppl", "radial")
    raw = {f"raw_{name}": theirs[f"{name}_prime"][0] for name in ("alpha", "beta")}
    compare(Radial(5), {"z0": theirs["x0"], **raw}, theirs)


def reversed_all(theirs):
    """The same map with inputs and outputs in reverse order of the dimensions."""
    return theirs | {name: mirrored(theirs[name]) for name in ("z", "x")}


def sylvester(theirs):
    """Weights in reverse order: Pyro multiplies from the right, so R and R̃ are transposed."""
    outer, inner = (
        np.triu(theirs[f"{name}_dense"], 1) + np.diag(theirs[f"{name}_diag"]) for name in "RS"
    )
    return {"outer": outer[::-1, ::-1].T, "inner": inner[::-1, ::-1].T, "b": theirs["b"][::-1]}


def test_triangular_sylvester_agrees_with_pyro():
    theirs = peer("pyro-ppl", "sylvester_triangular")
    compare(Sylvester(5, 5, "triangular"), sylvester(theirs), reversed_all(theirs))


def test_householder_sylvester_agrees_with_pyro_rotated_by_its_reflections():
    """The reference is ``z + Q (f(Q'z) - Q'z)``, where f is Pyro's layer with Q the identity.

    The dimensions are reversed, so that R' is upper triangular.
    """
    theirs = peer("pyro-ppl", "sylvester_householder")
    weights = sylvester(theirs) | {"q": theirs["reflections"][:, ::-1].T}
    compare(Sylvester(5, 5, "householder"), weights, reversed_all(theirs))


# ----------------------------------------------------------------------------------- couplings


def test_additive_coupling_agrees_with_nice_in_nflows():
    theirs = peer("nflows", "nice")
    weights = dense(theirs, ["transform_net.net.0", "transform_net.net.2"])
    compare(Coupling(5, Additive(), (8,)), weights, theirs, halves)


def test_affine_coupling_agrees_with_realnvp_in_normflows():
    """normflows has no clip of the log-scales, so ours gets very large bounds."""
    theirs = peer("normflows", "realnvp")
    weights = by_parameter(dense(theirs, ["param_map.0", "param_map.2"]), 2, last=1)
    weights = scaled(weights, 3, UNDO, last=1)
    compare(Coupling(5, UNCLIPPED, (8,)), weights, theirs, halves)


def test_spline_coupling_agrees_with_nflows():
    theirs = peer("nflows", "spline_coupling")
    weights = dense(theirs, ["transform_net.net.0", "transform_net.net.2"])
    weights = without_offset(by_parameter(weights, 3 * N_BINS - 1, last=1), 3, last=1)
    coupling = Coupling(5, RationalQuadratic(N_BINS, BOUND), (8,))
    compare(coupling, weights, theirs, halves)


# ------------------------------------------------------------------------------ autoregressive


def test_autoregressive_spline_agrees_with_nflows():
    """Hidden units have the degrees 1 2 3 4 1 2 3 4 in nflows, and 1 1 2 2 3 3 4 4 in ours."""
    theirs = peer("nflows", "spline_autoregressive")
    prefixes = [f"autoregressive_net.{layer}_layer" for layer in ("initial", "final")]
    weights = dense(theirs, prefixes, masked=True)
    ours = np.argsort(theirs["autoregressive_net.initial_layer.degrees"], kind="stable")
    weights |= {"w0": weights["w0"][:, ours], "b0": weights["b0"][ours], "w1": weights["w1"][ours]}
    weights = without_offset(by_parameter(weights, 3 * N_BINS - 1, last=1), 5, last=1)
    layer = InverseAutoregressive(5, RationalQuadratic(N_BINS, BOUND), (8,))
    compare(layer, weights, theirs, mirrored)


def test_inverse_autoregressive_agrees_with_iaf_in_pyro():
    theirs = peer("pyro-ppl", "iaf")
    weights = dense(theirs, ["arn.layers.0", "arn.layers.1"], masked=True)
    weights = scaled(weights, 5, UNDO, last=1)
    compare(InverseAutoregressive(5, UNCLIPPED, (8,)), weights, theirs, mirrored)


def test_masked_autoregressive_agrees_with_tensorflow_probability_on_a_network_of_pyro():
    theirs = peer("tensorflow-probability", "maf")
    weights = dense(theirs, ["layers.0", "layers.1"], masked=True)
    weights = scaled(weights, 5, UNDO, last=1)
    compare(MaskedAutoregressive(5, UNCLIPPED, (8,)), weights, theirs, mirrored)


@pytest.mark.parametrize("library", ["nflows", "normflows", "pyro-ppl", "tensorflow-probability"])
def test_files_name_the_version_that_made_them(library):
    wanted = (Path(__file__).parent / "peers" / "requirements.txt").read_text().splitlines()
    with np.load(Path(__file__).parent / "peers" / f"{library}.npz") as arrays:
        assert f"{library}=={arrays['version']}" in wanted
