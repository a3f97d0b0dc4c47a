"""Compile graphs for a backend: JAX, Numba, C, or NumPy one operation at a time."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytensor
from pymc.pytensorf import compile as pymc_compile
from pymc.pytensorf import resolve_backend_compile_kwargs
from pytensor.compile.mode import OPT_FAST_RUN, Mode
from pytensor.link.jax.linker import JAXLinker
from pytensor.link.vm import VMLinker

from pymc_flows.backend.jax_linker import jax_mode
from pymc_flows.messages import warn_user


def prefers_jax(backend: str | None, compile_kwargs: dict[str, Any] | None = None) -> bool:
    """Return whether JAX is to compile a function, if it can.

    Parameters
    ----------
    backend, compile_kwargs
        As in :func:`compile_function`.

    Examples
    --------
    >>> prefers_jax("jax"), prefers_jax("numba")
    (True, False)
    >>> prefers_jax(None, {"mode": "FAST_COMPILE"})
    False
    """
    if "mode" in (compile_kwargs or {}):
        return False
    return backend == "jax" or (backend is None and importlib.util.find_spec("jax") is not None)


def runs_on_jax(function: Any) -> bool:
    """Return whether a compiled PyTensor function runs on JAX.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> x = pt.vector("x")
    >>> runs_on_jax(compile_function([x], [2 * x], compile_kwargs={"mode": "FAST_COMPILE"}))
    False
    """
    return isinstance(function.maker.linker, JAXLinker)


def may_interpret(backend: str | None, compile_kwargs: dict[str, Any] | None = None) -> bool:
    """Return whether NumPy may run a function: it may not with JAX or with a given mode.

    Examples
    --------
    >>> may_interpret("numba"), may_interpret("jax")
    (True, False)
    """
    return not prefers_jax(backend, compile_kwargs) and "mode" not in (compile_kwargs or {})


def _numpy_mode() -> Mode:
    """Mode that runs one NumPy operation after another.

    Fusion is excluded, because Python would run a fused operation element by element.
    """
    linker = VMLinker(use_cloop=False, c_thunks=False, allow_gc=False)
    return Mode(linker, OPT_FAST_RUN.excluding("fusion", "cxx_only", "BlasOpt"))


def compile_function(
    inputs: Sequence[Any],
    outputs: Any,
    *,
    backend: str | None = None,
    compile_kwargs: dict[str, Any] | None = None,
    interpret: bool = False,
    trial: Callable[[Callable], Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Compile a function for a backend, and call it once to check that it runs there.

    Parameters
    ----------
    inputs, outputs
        As in ``pymc.pytensorf.compile``.
    backend : {"jax", "numba", "c"} or None
        None selects JAX if it is installed, and PyTensor's default backend otherwise. If JAX can't
        compile the graph, None then selects PyTensor's default backend, with a warning; "jax"
        raises JAX's error.
    compile_kwargs : dict, optional
        Further arguments of ``pymc.pytensorf.compile``; ``mode`` cannot be combined with
        ``backend``.
    interpret : bool, default False
        Run the function in NumPy if :func:`may_interpret` allows it. Each call takes several times
        as long (a step of RealNVP five to nine times as long as with Numba), but compilation takes
        a second instead of a minute with Numba or C.
    trial : callable, optional
        Calls the compiled function. JAX compiles at the first call, so it may fail only then.
    **kwargs
        Further arguments of ``pymc.pytensorf.compile``, which override ``compile_kwargs``.

    Returns
    -------
    pytensor.compile.function.types.Function
        The compiled function. It does not check the types of its inputs.

    Warns
    -----
    UserWarning
        If ``backend`` is None and the installed JAX can't compile the graph.

    Examples
    --------
    >>> import numpy as np
    >>> import pytensor.tensor as pt
    >>> x = pt.vector("x", dtype="float64")
    >>> function = compile_function([x], [2 * x], compile_kwargs={"mode": "FAST_COMPILE"})
    >>> function(np.array([1.0, 2.0]))
    [array([2., 4.])]
    """
    chosen = resolve_backend_compile_kwargs(backend, compile_kwargs)
    on_jax = prefers_jax(backend, chosen)
    interpret = interpret and may_interpret(backend, compile_kwargs)
    if interpret:
        chosen["mode"] = _numpy_mode()
    # inner graphs choose their own mode; without a C compiler they do not choose C
    flags = {"cxx": ""} if interpret else {}

    def attempt(extra):
        with warnings.catch_warnings(), pytensor.config.change_flags(**flags):
            # the warning is about copies of random generators; `compile` seeds the generators
            # before they are copied
            warnings.filterwarnings("ignore", message="The RandomType SharedVariables")
            function = pymc_compile(
                inputs, outputs, trust_input=True, **{**chosen, **extra, **kwargs}
            )
            if trial is not None:
                trial(function)
        return function

    if not on_jax:
        return attempt({"mode": jax_mode()} if backend == "jax" else {})
    try:
        return attempt({"mode": jax_mode()})
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        warn_user(
            f"JAX can't compile this model ({type(error).__name__}: {first_line}); PyTensor's "
            "default backend is used instead. Pass backend='numba' to avoid this warning",
        )
    return attempt({})
