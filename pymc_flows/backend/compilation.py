"""Which backend computes, and compiling for it."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytensor
import pytensor.tensor as pt
from pymc.pytensorf import compile as pymc_compile
from pymc.pytensorf import resolve_backend_compile_kwargs
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import OPT_FAST_RUN, Mode, get_mode
from pytensor.graph.fg import FrozenFunctionGraph, FunctionGraph
from pytensor.graph.rewriting.basic import NodeRewriter, in2out
from pytensor.link.jax.linker import JAXLinker
from pytensor.link.vm import VMLinker
from pytensor.scan.op import Scan
from pytensor.tensor.math import neg, softplus

from pymc_flows.backend.loops import Loop, LoopRows, teach_jax
from pymc_flows.messages import warn_user


def prefers_jax(backend: str | None, compile_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a backend is JAX, or would be by default."""
    if "mode" in (compile_kwargs or {}):
        return False
    return backend == "jax" or (backend is None and importlib.util.find_spec("jax") is not None)


def runs_on_jax(function) -> bool:
    """Whether a compiled function is JAX's."""
    return isinstance(function.maker.linker, JAXLinker)


def may_interpret(backend: str | None, compile_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a function may be run in NumPy: on all backends but JAX, unless a mode is asked for."""
    return not prefers_jax(backend, compile_kwargs) and "mode" not in (compile_kwargs or {})


def _interpreter() -> Mode:
    """NumPy, one operation after another; fused ones would be loops in Python."""
    linker = VMLinker(use_cloop=False, c_thunks=False, allow_gc=False)
    return Mode(linker, OPT_FAST_RUN.excluding("fusion", "cxx_only", "BlasOpt"))


@functools.cache
def _atanh_series() -> np.ndarray:
    """atanh(s) / s in powers of s², for s up to 1/3, to rounding: Taylor's series, economized."""
    from numpy.polynomial import Chebyshev, Polynomial

    taylor = Polynomial(1 / (2 * np.arange(20) + 1))
    economized = taylor.convert(domain=[0, 1 / 9], kind=Chebyshev).truncate(11)
    return economized.convert(domain=[-1, 1], kind=Polynomial).coef


def log1p_of_share(x):
    """log(1 + x) for x from 0 to 1, to two units in the last place, in a fifth of XLA's time.

    It is 2 atanh(x / (2 + x)).
    """
    coefficients = _atanh_series().astype(x.dtype)
    s = x / (2 + x)
    squared, series = s * s, coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        series = series * squared + coefficient
    return 2 * s * series


class PlainSoftplus(NodeRewriter):
    """Write log(1 + exp(x)) without branches, of which JAX would compute all.

    Of x and -x, both of which a Bernoulli's likelihood takes, the logarithm is then the same.
    """

    def transform(self, fgraph, node, enforce_tracks=True):
        """Say what takes a softplus's place."""
        if node.op != softplus:
            return None
        (x,) = node.inputs
        size = abs(x.owner.inputs[0] if x.owner is not None and x.owner.op == neg else x)
        result = pt.maximum(x, 0) + log1p_of_share(pt.exp(-size))
        return [result.astype(node.outputs[0].dtype)]


# elements of a graph's largest array from which on it is worth it to share operations out to threads
WORTH_SHARING = 2**17


class PlainLinker(JAXLinker):
    """JAX's linker, without two things that XLA does on a CPU.

    The library that it fuses operations with (YNN): that of jaxlib 0.12 ended the process, by a
    segmentation fault, on a spline of 8442 points. And, where all arrays are small, the division
    of operations among threads, which then wait for each other for longer than they work.
    """

    def jit_compile(self, fn):
        """Compile what a graph has become."""
        import jax

        static = self.scalar_shape_inputs
        options = accepted_options(xla_cpu_experimental_ynn_fusion_type="")
        if largest_array(self.fgraph) < WORTH_SHARING:
            options = options | accepted_options(
                xla_disable_hlo_passes="cpu-parallel-task-assigner"
            )

        def exact(*args):
            # on other devices, products in single precision would be rounded to fewer digits
            with jax.default_matmul_precision("highest"):
                return fn(*args)

        jitted = jax.jit(exact, static_argnums=static, compiler_options=options)
        if not static:
            return jitted
        return lambda *args: jitted(*(int(a) if i in static else a for i, a in enumerate(args)))


def largest_array(fgraph: FunctionGraph | FrozenFunctionGraph) -> float:
    """Elements of the largest array that a graph computes, inf where a shape is not known.

    Where there are loops, they take most of the time: what is beside them counts an eighth, and where
    its shape is not known, as that of a loop's results often is, not at all.
    """
    within, beside = [0.0], [0.0]  # loops and other inner graphs, and what is in none
    loops = False
    for node in fgraph.apply_nodes:
        if isinstance(node.op, Scan | OpFromGraph):
            loops |= isinstance(node.op, Scan)
            within.append(largest_array(node.op.fgraph))
        elif isinstance(node.op, Loop):
            within.append(largest_array(node.op.op.fgraph))
        else:
            shapes = [getattr(out.type, "shape", ()) for out in node.outputs]
            beside += [math.inf if None in shape else math.prod(shape) for shape in shapes]
    if loops:
        beside = [size / 8 for size in beside if size < math.inf]
    return max(*within, *beside)


@functools.cache
def accepted_options(**options: str | bool) -> dict[str, str | bool]:
    """Those of XLA's options that the installed XLA has."""
    import jax

    def accepts(name, value):
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if accepts(name, value)}


@functools.cache
def _jax() -> Mode:
    """JAX's mode, with loops for rows of equal operations, and a softplus without branches."""
    teach_jax()
    rewrites = get_mode("JAX").provided_optimizer
    # after all others, which would make a softplus of it again
    plain = in2out(PlainSoftplus(), name="plain_softplus")
    return Mode(PlainLinker(), rewrites.register((LoopRows(), 200), (plain, 201)))


def compile_function(
    inputs,
    outputs,
    *,
    backend: str | None = None,
    compile_kwargs: dict[str, Any] | None = None,
    interpret: bool = False,
    trial: Callable[[Callable], Any] | None = None,
    **kwargs,
):
    """Compile for a backend, and call once to see that it works there.

    Parameters
    ----------
    inputs, outputs
        As in ``pymc.pytensorf.compile``.
    backend : {"jax", "numba", "c"} or None
        None is JAX where it is installed, and, with a warning, PyTensor's default where JAX can't
        compile the graph; PyTensor's default where JAX is not installed.
    compile_kwargs : dict, optional
        Passed on; its ``mode`` cannot be combined with ``backend``.
    interpret : bool, default False
        Run in NumPy where :func:`may_interpret` allows: each call takes several times as long
        (RealNVP's step five to nine times numba's), but the first takes a second, where numba and C
        compile for a minute.
    trial : callable, optional
        Calls the compiled function; JAX says what it can't do only then.
    **kwargs
        Passed on.
    """
    chosen = resolve_backend_compile_kwargs(backend, compile_kwargs)
    choose_jax = prefers_jax(backend, chosen)
    interpret = interpret and may_interpret(backend, compile_kwargs)
    if interpret:
        chosen["mode"] = _interpreter()
    # without a C compiler, the graphs within a graph, which choose for themselves, do not use one
    flags = {"cxx": ""} if interpret else {}

    def attempt(extra):
        with warnings.catch_warnings(), pytensor.config.change_flags(**flags):
            # the copies that it speaks of are seeded by compile, just before they are made
            warnings.filterwarnings("ignore", message="The RandomType SharedVariables")
            function = pymc_compile(
                inputs, outputs, trust_input=True, **{**chosen, **extra, **kwargs}
            )
            if trial is not None:
                trial(function)
        return function

    if not choose_jax:
        return attempt({"mode": _jax()} if backend == "jax" else {})
    try:
        return attempt({"mode": _jax()})
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        warn_user(
            f"JAX can't compile this model ({type(error).__name__}: {first_line}); PyTensor's "
            "default backend is used instead. backend='numba' does so without this warning",
        )
    return attempt({})
