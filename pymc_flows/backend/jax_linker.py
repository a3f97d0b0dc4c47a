"""The JAX mode of this package: its graph rewrites, and its linker with XLA's options for CPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytensor.tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.compile.mode import Mode, get_mode
from pytensor.graph.basic import Apply, Variable
from pytensor.graph.fg import FrozenFunctionGraph, FunctionGraph
from pytensor.graph.rewriting.basic import NodeRewriter, in2out
from pytensor.link.jax.linker import JAXLinker
from pytensor.scan.op import Scan
from pytensor.tensor.math import neg, softplus

from pymc_flows.backend.loops import Loop, RepeatedOpsToLoops, register_jax_dispatch

# number of elements of a graph's largest array below which one thread is used, because XLA's
# threads would wait for each other longer than they compute
MIN_ARRAY_FOR_THREADS = 2**17
# divisor of the sizes of arrays outside loops, in graphs with loops, because loops take most of the
# time
OUTSIDE_LOOP_DISCOUNT = 8
# terms of the Taylor series of atanh(s) / s in s²; the remainder is below rounding for s <= 1/3
ATANH_TAYLOR_TERMS = 20
# degree in s² of the Chebyshev approximation to that series; its error is below rounding
ATANH_DEGREE = 11


@functools.cache
def _atanh_coefficients() -> np.ndarray:
    """Coefficients of atanh(s) / s in powers of s², exact to rounding for s from 0 to 1/3.

    They are those of Taylor's series, economized by Chebyshev polynomials.
    """
    from numpy.polynomial import Chebyshev, Polynomial

    taylor = Polynomial(1 / (2 * np.arange(ATANH_TAYLOR_TERMS) + 1))
    chebyshev = taylor.convert(domain=[0, 1 / 9], kind=Chebyshev)
    economized = chebyshev.truncate(ATANH_DEGREE)
    return economized.convert(domain=[-1, 1], kind=Polynomial).coef


def log1p_on_unit_interval(x: Any) -> Any:
    """Compute log(1 + x) for x from 0 to 1, to two units in the last place.

    It is 2 atanh(x / (2 + x)), by a polynomial, and takes a fifth of the time of XLA's ``log1p``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(0, 1, 101)
    >>> bool(np.allclose(log1p_on_unit_interval(x), np.log1p(x), rtol=1e-15))
    True
    """
    coefficients = _atanh_coefficients().astype(x.dtype)
    s = x / (2 + x)
    squared, series = s * s, coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        series = series * squared + coefficient
    return 2 * s * series


class BranchlessSoftplus(NodeRewriter):
    r"""Write log(1 + exp(x)) without branches, because JAX computes all branches of each element.

    A Bernoulli likelihood takes the softplus of x and of -x. Both then share the logarithm of 1 +
    exp(-\|x\|).
    """

    def transform(
        self,
        fgraph: FunctionGraph,
        node: Apply,
        enforce_tracks: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> list[Variable] | bool:
        """Return the replacement of a softplus, or False for any other node."""
        if node.op != softplus:
            return False
        x: Any = node.inputs[0]
        size = abs(x.owner.inputs[0] if x.owner is not None and x.owner.op == neg else x)
        result = pt.maximum(x, 0) + log1p_on_unit_interval(pt.exp(-size))
        return [result.astype(node.outputs[0].type.dtype)]


class CPUOptionsJAXLinker(JAXLinker):
    """JAX's linker, with two of XLA's CPU features turned off.

    Fusion by the YNN library is always off: with jaxlib 0.12, it caused a segmentation fault for a
    spline of 8442 points. The division of operations among threads is off for graphs of small
    arrays.
    """

    def fgraph_convert(self, fgraph: FunctionGraph, *args: Any, **kwargs: Any) -> Callable:
        """Convert a graph to a JAX function, with JAX's version of :class:`Loop` registered.

        An unpickled function is converted again, possibly in a process that has compiled nothing.
        """
        register_jax_dispatch()
        return super().fgraph_convert(fgraph, *args, **kwargs)

    def jit_compile(self, fn: Callable) -> Callable:
        """Compile a converted graph."""
        import jax

        assert self.fgraph is not None
        static = self.scalar_shape_inputs
        options = supported_xla_options(xla_cpu_experimental_ynn_fusion_type="")
        if largest_array(self.fgraph) < MIN_ARRAY_FOR_THREADS:
            options = options | supported_xla_options(
                xla_disable_hlo_passes="cpu-parallel-task-assigner"
            )

        def exact(*args):
            # other devices would round products in single precision to fewer digits
            with jax.default_matmul_precision("highest"):
                return fn(*args)

        jitted = jax.jit(exact, static_argnums=static, compiler_options=options)
        if not static:
            return jitted
        return lambda *args: jitted(*(int(a) if i in static else a for i, a in enumerate(args)))


def largest_array(fgraph: FunctionGraph | FrozenFunctionGraph) -> float:
    """Return the number of elements of the largest array that a graph computes.

    In a graph with loops, the loops take most of the time. The size of an array outside them is
    then divided by ``OUTSIDE_LOOP_DISCOUNT``, and an array of unknown size outside them is ignored,
    because the results of loops often have unknown sizes.

    Parameters
    ----------
    fgraph : FunctionGraph or FrozenFunctionGraph
        The graph; inner graphs are searched too.

    Returns
    -------
    float
        Number of elements; inf if an array's shape is not static.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pytensor.graph.fg import FunctionGraph
    >>> x = pt.matrix("x", shape=(30, 4))
    >>> largest_array(FunctionGraph([x], [pt.exp(x).sum()]))
    120
    """
    inside, outside = [0.0], [0.0]
    has_loops = False
    for node in fgraph.apply_nodes:
        if isinstance(node.op, Scan | OpFromGraph):
            has_loops |= isinstance(node.op, Scan)
            inside.append(largest_array(node.op.fgraph))
        elif isinstance(node.op, Loop):
            inside.append(largest_array(node.op.op.fgraph))
        else:
            shapes = [getattr(out.type, "shape", ()) for out in node.outputs]
            outside += [math.inf if None in shape else math.prod(shape) for shape in shapes]
    if has_loops:
        outside = [size / OUTSIDE_LOOP_DISCOUNT for size in outside if size < math.inf]
    return max(*inside, *outside)


@functools.cache
def supported_xla_options(**options: str | bool) -> dict[str, str | bool]:
    """Return the given options that the installed XLA supports."""
    import jax

    def is_supported(name, value):
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if is_supported(name, value)}


@functools.cache
def jax_mode() -> Mode:
    """Return JAX's mode with :class:`RepeatedOpsToLoops` and :class:`BranchlessSoftplus`."""
    rewrites = get_mode("JAX").provided_optimizer
    # it runs last, because other rewrites would turn its result into a softplus again
    branchless = in2out(BranchlessSoftplus(), name="branchless_softplus")
    return Mode(
        CPUOptionsJAXLinker(), rewrites.register((RepeatedOpsToLoops(), 200), (branchless, 201))
    )
