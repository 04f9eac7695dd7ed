"""Gradient descent on the layer-peeled model: the Euler discretisation of its flow."""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, read_array
from ncjax.checks import check_integer, check_positive
from ncjax.numerics import on_device
from ncjax.peeled.kernels import cross_entropy, log_cross_entropy
from ncjax.peeled.points import Point, check_any_point, last_factors
from ncjax.types import Array


class DescentSolution(NamedTuple, Generic[Point]):
    """Gradient descent at the T requested step counts."""

    steps: Array  # (T,)    number of steps taken (int32)
    log_times: Array  # (T,)    log of steps x step size, the flow's log t
    params: Point | None  # (T, ...) state, None if `record` was given
    recorded: Any  # (T, ...) record(params), None if it was not given
    log_loss: Array  # (T,)    log L
    final: Point  # state after the last step


def gradient_descent(
    params: Point,
    step_size: float,
    num_steps: int,
    *,
    weights=None,
    save_steps=None,
    record: Callable[[Point], Any] | None = None,
) -> DescentSolution[Point]:
    r"""Gradient descent $Z_{s+1} = Z_s - \eta \nabla \mathcal L(Z_s)$, one compiled loop.

    This is the explicit Euler discretisation of `gradient_flow`, with $t = s \eta$, and
    the method of the paper's own simulations. It takes $e^{20} / \eta$ steps to reach
    log t = 20.

    Args:
      params: start, `W` (K, d) and `H` (K, n, d), or `DeepParams`. Half precision is
        descended in float32.
      step_size: eta, positive.
      num_steps: number of steps, at least 1.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, not negative.
        Samples of weight 0 are left out: their rows of H are zero. None is 1 everywhere.
      save_steps: (T,) strictly increasing step counts in [0, num_steps] at which the state
        is saved. None saves about 200, evenly spaced in the logarithm, up to `num_steps`.
      record: function of the state; its value is saved instead of the state.

    Returns:
      `DescentSolution`, float32 for half precision. The log time of step 0 is `-inf`, which
      `jax_debug_infs` reports.

    Raises:
      ValueError: shapes, dtypes or weights do not fit, a number is out of range,
        save_steps do not increase, or (outside jit) params hold NaN or infinity.

    Source: Ji et al. (ICLR 2022), Section 3 (simulations).

    >>> import jax, ncjax
    >>> start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    >>> ncjax.gradient_descent(start, 0.1, 1000).params.H.shape[1:]
    (3, 2, 4)
    """
    params, weights = check_any_point(params, weights, finite=True)
    check_integer("num_steps", num_steps, least=1)
    if num_steps >= 2**31:
        raise ValueError(f"num_steps must be below 2**31, got {num_steps}")
    check_positive("step_size", step_size, params.W.dtype)
    if save_steps is None:
        save_steps = np.unique(np.geomspace(1, num_steps, 200).round().astype(np.int32))
    steps = np.asarray(read_array("save_steps", save_steps))
    increasing = steps.ndim == 1 and steps.size and np.all(steps[1:] > steps[:-1])
    if not increasing or steps.dtype.kind not in "iu":
        raise ValueError(
            f"save_steps must be strictly increasing integers (T,), got {steps}"
        )
    if steps[0] < 0 or steps[-1] > num_steps:
        raise ValueError(
            f"save_steps must lie in [0, num_steps = {num_steps}], got {steps}"
        )
    return _descend(
        params,
        weights,
        on_device(step_size, params.W.dtype),
        as_array("save_steps", steps.astype(np.int32)),
        on_device(num_steps, np.int32),
        record,
    )


@partial(jax.jit, static_argnums=5)
def _descend(params, weights, step_size, steps, num_steps, record):
    def step(_index, state):
        gradient = jax.grad(lambda z: cross_entropy(last_factors(z), weights))(state)
        return jax.tree.map(lambda leaf, g: leaf - step_size * g, state, gradient)

    def until_saved(carry, target):
        state, done = carry
        state = jax.lax.fori_loop(done, target, step, state)
        recorded = state if record is None else record(state)
        return (state, target), (recorded, log_cross_entropy(last_factors(state), weights))

    start = (params, jnp.zeros((), jnp.int32))
    (state, done), (recorded, log_loss) = jax.lax.scan(until_saved, start, steps)
    return DescentSolution(
        steps=steps,
        log_times=jnp.log(steps.astype(step_size.dtype)) + jnp.log(step_size),
        params=recorded if record is None else None,
        recorded=None if record is None else recorded,
        log_loss=log_loss,
        final=jax.lax.fori_loop(done, num_steps, step, state),
    )
