"""One formula for CPUs and another for accelerators, chosen where the program will run."""

from collections.abc import Callable

import jax

from ncjax.types import Array


def by_platform(on_cpu: Callable[..., Array], elsewhere: Callable[..., Array]):
    """Return a function that is `on_cpu` on CPUs and `elsewhere` on other platforms.

    A program that is lowered for one platform holds the formula of that platform alone. The
    gradient keeps the arguments and nothing else, because the parts that `jax.grad` would
    keep of two formulas differ.

    Args:
      on_cpu: function of arrays.
      elsewhere: function of the same arrays, with results of the same shape and dtype.

    Returns:
      Function with a reverse derivative, which can be differentiated again in either mode.
    """

    def choose(*arrays):
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)

    def forward(*arrays):
        cpu, default = _value(on_cpu), _value(elsewhere)
        return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default), arrays

    def backward(arrays, cotangent):
        cpu, default = _gradient(on_cpu), _gradient(elsewhere)
        return jax.lax.platform_dependent(cotangent, *arrays, cpu=cpu, default=default)

    chosen = jax.custom_vjp(choose)
    chosen.defvjp(forward, backward)
    return chosen


def _value(formula: Callable[..., Array]):
    """Return the formula by its own forward rule, which has a forward derivative."""
    return lambda *arrays: jax.vjp(formula, *arrays)[0]


def _gradient(formula: Callable[..., Array]):
    """Return the gradients in the arguments as a function of cotangent and arguments."""
    return lambda cotangent, *arrays: jax.vjp(formula, *arrays)[1](cotangent)
