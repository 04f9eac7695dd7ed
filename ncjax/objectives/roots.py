"""Roots of scalar functions on the host, safeguarded by a bracket."""

from collections.abc import Callable

_EPS = 2.0**-52


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return a root between `low` and `high`, where `function` has opposite signs."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]  # slow to import

    return brentq(function, low, high, xtol=1e-300, rtol=4 * _EPS, maxiter=3000)


def root_above(function: Callable[[float], float], low: float) -> float:
    """Return the root above `low` of a function that falls from above 0 there."""
    step = 1.0
    while function(low + step) > 0:
        low, step = low + step, 2 * step
    return root(function, low, low + step)


def root_below(function: Callable[[float], float], high: float) -> float:
    """Return the root below `high` of a function that falls and is negative at `high`."""
    return -root_above(lambda x: -function(-x), -high)
