"""The models and approximations of the golden files, by names that all formats' versions have."""

import numpy as np
import pymc as pm

import pymc_flows as pmf

# seed of the draws that accompany each file
SEED = 3
# number of these draws
N_DRAWS = 20
# options of mnf groups
MNF = {"n_layers": 2, "n_auxiliary_layers": 2, "hidden": 3, "n_statistics": 2}
# families that the files cover, with their options
FAMILIES = {
    "planar": {"n_layers": 2},
    "radial": {"n_layers": 2, "affine": "diagonal"},
    "householder": {"n_layers": 2},
    "nice": {"n_layers": 2, "hidden": (4,)},
    "realnvp": {"n_layers": 2, "hidden": (4,)},
    "nsf": {"n_layers": 2, "hidden": (4,), "n_bins": 3},
    "nsf_autoregressive": {"n_layers": 1, "hidden": (4,), "n_bins": 3},
    "iaf": {"n_layers": 1, "hidden": (4,)},
    "maf": {"n_layers": 1, "hidden": (4,)},
    "glow": {"n_layers": 2, "hidden": (4,)},
    "sylvester": {"n_layers": 2, "rank": 2, "affine": "low_rank"},
    "naf": {"n_layers": 1, "hidden": (4,), "n_units": 3},
    "bnaf": {"n_layers": 1, "hidden": (2,)},
    "residual": {"n_layers": 1, "hidden": (4,)},
    "cnf": {"hidden": 4, "n_steps": 4},
}


def hierarchical():
    """Build a model of three elements, whose ``a`` a non-centred fit standardises."""
    with pm.Model(coords={"side": ["left", "right"]}) as model:
        b = pm.HalfNormal("b")
        a = pm.Normal("a", 0, b, dims="side")
        pm.Normal("y", a.sum(), b + 0.5, observed=np.array([0.5, 1.0, -0.3]))
    return model


def regression():
    """Build a model whose posterior is Gaussian, so that an affine map is exact."""
    with pm.Model() as model:
        x = pm.Normal("x", shape=3)
        pm.Normal("y", x.sum(), observed=np.array([0.5, 1.0, -0.3]))
    return model


def normals(names, n_elements=3):
    """Build a model of standard normal vectors."""
    with pm.Model() as model:
        for name in names:
            pm.Normal(name, shape=n_elements)
    return model


def of_families(first, last):
    """Return a builder of a model with a vector for each family in a part of the list."""
    names = [name for name in list(FAMILIES)[first:last] if name in pmf.families().index]
    return lambda: normals(names)


def eight():
    """Build a model of one normal vector of eight elements."""
    return normals("x", 8)


def amortised():
    """Build a model of two vectors, each with a context for every row."""
    with pm.Model() as model:
        seen = pm.Data("seen", np.array([-1.0, 0.3, 2.0]))
        z = pm.Normal("z", shape=3)
        pm.Normal("w", shape=2)
        pm.Deterministic("column", seen[:, None])
        pm.Normal("y", z, 0.5, observed=seen)
    return model


def network():
    """Build a small neural network: two matrices, biases and a scale."""
    inputs = np.random.default_rng(1).normal(size=(12, 3))
    with pm.Model() as model:
        first = pm.Normal("first", shape=(3, 4))
        bias = pm.Normal("bias", shape=4)
        last = pm.Normal("last", shape=(4, 1))
        scale = pm.HalfNormal("scale")
        hidden = pm.math.tanh(inputs @ first + bias)
        pm.Normal("y", (hidden @ last)[:, 0], scale, observed=np.tanh(inputs[:, 0]))
    return model


def moved(approx, scale=0.2):
    """Move all weights away from the initial ones by random numbers."""
    rng = np.random.default_rng(2)
    for param in approx.params:
        value = param.get_value()
        param.set_value((value + scale * rng.normal(size=value.shape)).astype(value.dtype))
    return approx


def one_flow(vfam, **options):
    """Return a builder of an approximation with a single flow."""

    def build(model):
        return moved(pmf.NormalizingFlow(vfam, model=model, random_seed=1, **options))

    return build


def fitted(**arguments):
    """Return a builder of an approximation by ``pm.fit``."""

    def build(model):
        with model:
            return pm.fit(random_seed=1, progressbar=False, **arguments)

    return build


def several_groups(model):
    """Make a flow, a mean field and a full rank, of a vector each."""
    with model:
        groups = [
            pm.Group([model["a"]], vfam="realnvp", n_layers=1, hidden=(4,), random_seed=1),
            pm.Group([model["b"]], vfam="mean_field", random_seed=1),
            pm.Group([model["c"]], vfam="full_rank", random_seed=1),
        ]
    return moved(pmf.FlowApproximation(groups, model=model, random_seed=4))


def families_by_group(model):
    """Make a group of each vector, by the family of the vector's name."""
    with model:
        groups = [
            pm.Group([rv], vfam=rv.name, random_seed=1, **FAMILIES[rv.name])
            for rv in model.free_RVs
        ]
    return moved(pmf.FlowApproximation(groups, model=model, random_seed=4))


def with_contexts(model):
    """Make two groups: one whose context is the model's, one whose context is an array."""
    array = np.array([[1, 0], [0, 2]])
    options = {"vfam": "iaf", "n_layers": 1, "hidden": (4,), "random_seed": 1}
    with model:
        groups = [
            pm.Group([model["z"]], context=model["column"], **options),
            pm.Group([model["w"]], context=array, **options),
        ]
    return moved(pmf.FlowApproximation(groups, model=model, random_seed=4))


def matrices(**options):
    """Return a builder of an mnf group for the matrices and a mean field for the rest."""

    def build(model):
        variables = [model["first"], model["last"]]
        with model:
            mnf = pm.Group(variables, vfam="mnf", random_seed=1, **{**MNF, **options})
            rest = pm.Group(None, vfam="mean_field", random_seed=1)
        return moved(pmf.FlowApproximation([mnf, rest], model=model, random_seed=4))

    return build


def ready_bijection(model):
    """Make a flow from a bijection that is built by hand."""
    b = pmf.bijections
    layers = [b.Permutation(3, (2, 0, 1)), b.Scale(3), b.Loc(3), b.LowerTriangular(3)]
    if hasattr(b, "LU"):
        layers.append(b.LU(3, (2, 0, 1)))
    return one_flow(b.Chain([*layers, b.Tails(3)]))(model)


def grown(model):
    """Make the default flow with couplings, placed inside a full factor as a fit places it."""
    approx = one_flow("flow", n_layers=2, hidden=(4,))(model)
    factor = np.array([[1.0, 0, 0], [2, 1, 0], [0, 3, 1]])
    approx.groups[0].place(np.array([1.0, 2.0, 3.0]), factor)
    return approx


def low_rank(vfam):
    """Return a builder of a flow that is placed inside a low-rank factor."""

    def build(model):
        vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0]
        packed = np.column_stack([np.arange(1.0, 9.0), vectors, 3 * vectors])
        options = {"n_layers": 1, "hidden": (4,)} if vfam == "flow" else {}
        approx = one_flow(vfam, **options)(model)
        approx.groups[0].place(np.arange(8.0), packed)
        return approx

    return build


# Cases of each format. Version a5ed9ab of format 1 could write all cases that version 7dd1b68 of
# format 2 could, so format 2 has fewer files. Format 0 is the first version of format 1.
ALL = (0, 1, 2, 3, 4)
NOT_SECOND = (0, 1, 3, 4)
# named families beyond the core cases
NAMED = (0, 1, 4)
# formats written since there are bases other than the normal
SINCE_BASES = (1, 3, 4)
NAMED_SINCE_BASES = (1, 4)
# name: model, builder of the approximation, and formats
CASES = {
    "default": (hierarchical, fitted(method="flow", n=30), ALL),
    "default-affine": (regression, fitted(method="flow", n=30), ALL),
    "default-couplings": (hierarchical, grown, ALL),
    "realnvp": (
        hierarchical,
        fitted(method="realnvp", n=5, initialize=False, inf_kwargs={"n_layers": 2, "hidden": (4,)}),
        ALL,
    ),
    "formula": (hierarchical, one_flow("scale-hh*2-radial*2-loc"), NOT_SECOND),
    "bijection": (hierarchical, ready_bijection, NOT_SECOND),
    "groups": (lambda: normals("abc"), several_groups, ALL),
    "families-planar": (of_families(0, 3), families_by_group, NAMED),
    "families-coupling": (of_families(3, 6), families_by_group, NAMED),
    "families-autoregressive": (of_families(6, 9), families_by_group, NAMED_SINCE_BASES),
    "families-linear": (of_families(9, 11), families_by_group, NAMED_SINCE_BASES),
    "families-neural": (of_families(11, 13), families_by_group, NAMED_SINCE_BASES),
    "families-residual": (of_families(13, 15), families_by_group, NAMED_SINCE_BASES),
    "full-rank-advi": (hierarchical, fitted(method="fullrank_advi", n=5), NOT_SECOND),
    "mixture": (hierarchical, one_flow("scale-loc", base="mixture", n_components=2), SINCE_BASES),
    "student-t": (hierarchical, one_flow("scale-loc", base="student_t"), SINCE_BASES),
    "context": (amortised, with_contexts, SINCE_BASES),
    "low-rank": (eight, low_rank("scale-loc"), SINCE_BASES),
    "low-rank-tails": (eight, low_rank("flow"), SINCE_BASES),
    "mnf": (network, matrices(), (1, 2, 3, 4)),
    "mnf-not-rowwise": (network, matrices(rowwise=False), SINCE_BASES),
    "mnf-correlated": (network, matrices(correlated=True), (3, 4)),
    "mnf-weights": (network, matrices(multipliers="weights"), (4,)),
}
