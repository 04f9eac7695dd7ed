"""Programs of diffrax without the checks that would call the host.

`diffrax.diffeqsolve` checks the signs and the order of its times by `equinox.error_if`,
which leaves callbacks to Python in the program, even with `throw=False`. A program with
callbacks runs on no exported platform and enters no persistent cache. The flow checks its
times itself and reports `BAD_TIMES`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Names of the compiled functions of diffrax that holds checks, and of equinox that is one.
_SOLVE, _CHECK = "diffeqsolve", "branched_error_if_impl"


def without_checks(fn: Callable[[], Any]) -> Any:
    """Return `fn()`, which calls `diffrax.diffeqsolve`, without the checks of that call.

    Every number is computed as with the checks.

    Args:
      fn: function without arguments that returns a pytree of arrays.
    """
    program, shapes = jax.make_jaxpr(fn, return_shape=True)()
    results = core.jaxpr_as_fun(_remove(program))()
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _remove(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return the program with its uses of a checked value turned to the value itself."""
    values: dict[Any, Any] = {}  # of each variable that a check returns

    def value(variable):
        return (
            variable
            if isinstance(variable, core.Literal)
            else values.get(variable, variable)
        )

    equations = []
    for equation in program.jaxpr.eqns:
        equation = equation.replace(invars=[value(v) for v in equation.invars])
        name = equation.params.get("name")
        if name == _CHECK:  # (value, condition) -> (marker of equinox, value)
            values[equation.outvars[-1]] = equation.invars[0]
            continue
        if name == _SOLVE:
            inner = _remove(equation.params["jaxpr"])
            equation = equation.replace(params=equation.params | {"jaxpr": inner})
        equations.append(equation)
    outputs = [value(v) for v in program.jaxpr.outvars]
    return program.replace(jaxpr=program.jaxpr.replace(eqns=equations, outvars=outputs))
