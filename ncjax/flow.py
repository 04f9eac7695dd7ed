"""Gradient flow of the layer-peeled model at any physical time, and gradient descent."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.geometry import balance, squared_norm
from ncjax.losses import cross_entropy, log_cross_entropy
from ncjax.types import Array, Params, check_integer, check_params, check_positive

# Values of `result`.
SUCCESS = 0
STEP_LIMIT = 1
STEP_TOO_SMALL = 2  # the state or its gradient is not finite, or the dtype too coarse
BAD_TIMES = 3  # under jit, where the times asked for cannot be refused

# First step in x. The controller corrects it within a few trials; diffrax's own guess
# would turn a start of NaN into a step of NaN, which never ends.
_FIRST_STEP = 0.1


class InvariantDrift(NamedTuple):
    """How far the two conserved quantities of the flow have moved: the solver's error."""

    balance: Array  # |B(Z) - B(Z_0)|_F / |Z|²,          B of `ncjax.balance`
    classifier_sum: Array  # |Σ_k w_k - Σ_k w_k(0)| / |Z|


class FlowSolution(NamedTuple):
    """Gradient flow at the T times asked for; entries not reached are NaN."""

    log_times: Array  # (T,)    natural logarithm of physical time
    params: Params | None  # (T, ...) state, None where `record` was given
    recorded: Any  # (T, ...) record(params), None where it was not given
    log_loss: Array  # (T,)    log L
    drift: InvariantDrift  # (T,)    of the invariants since the given start
    final: Params  # state at the last time, to go on from; NaN if it was not reached
    num_steps: Array  # ()      solver steps tried
    num_rejected: Array  # ()      of which rejected
    result: Array  # ()      SUCCESS, STEP_LIMIT, STEP_TOO_SMALL or BAD_TIMES (int32)


def gradient_flow(
    params: Params,
    log_times,
    *,
    start_log_time: float = -math.inf,
    rtol: float | None = None,
    atol: float | None = None,
    solver: diffrax.AbstractSolver | None = None,
    record: Callable[[Params], Any] | None = None,
    max_steps: int = 1_000_000,
    progress: bool = False,
) -> FlowSolution:
    r"""The exact gradient flow $dZ/dt = -\nabla \mathcal L(Z)$, saved at given times.

    The gradient fades like $1/(t \log t)$ and $t$ itself overflows at $\log t = 709$, so
    the equation is solved on the clock $x = \log(1 + \log(1 + t))$. With
    $u = \log(1 + t) = e^x - 1$,

    $$\frac{dZ}{dx} = -(1 + u)\, e^{u + \log \mathcal L(Z)}\, \nabla \log \mathcal L(Z),$$

    the same trajectory with every quantity finite. The equation grows stiff in
    proportion to $\log t$: an explicit solver takes about 0.4 steps (Tsit5) per unit.

    Works under `jax.jit` and under `jax.vmap` over `params`; a start that fails (see
    `result`) leaves the others as they are. Reverse-mode differentiable.

    Args:
      params: start `Z(t_0)`, `W` (K, d) and `H` (K, n, d). The dtype of the solve.
      log_times: (T,) strictly increasing natural logarithms of the physical time t;
        `-inf` is t = 0. In float64 to 1e6 and beyond, in float32 to about 3e4.
      start_log_time: natural logarithm of the time t_0 of `params`, t_0 = 0 if not given.
        Lets a long flow be taken in legs, from `final` on.
      rtol: relative tolerance of a step; 1e-8 in float64 and 1e-6 in float32 if None.
      atol: absolute tolerance of a step; if None as rtol, times the root mean square of
        `params` where that is below 1, so that small starts are followed too.
      solver: a diffrax solver, `diffrax.Tsit5()` if None.
      record: function of the state whose value (any pytree of arrays) is saved instead of
        the state. It is compiled in: pass the same function object to compile once.
      max_steps: bound on the solver's steps, rejected ones included.
      progress: show a tqdm bar (over x).

    Returns:
      `FlowSolution`.

    Raises:
      ValueError: shapes or dtypes do not fit, or (outside jit) times do not increase,
        tolerances are not positive, or params hold NaN or infinity.

    Source: the flow is equation (4) of Ji et al. (ICLR 2022); the clock is ncjax's.

    >>> import jax, numpy as np, ncjax
    >>> start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    >>> flow = ncjax.gradient_flow(start, np.log([1.0, 10.0, 100.0]))
    >>> flow.params.W.shape
    (3, 3, 4)
    """
    params = check_params(params, finite=True)
    dtype = params.W.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"params must be float32 or float64, got {dtype}")
    log_times = _check_log_times(log_times, start_log_time, dtype)
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-6
    rtol = tolerance if rtol is None else rtol
    check_positive("rtol", rtol)
    if atol is not None:
        check_positive("atol", atol)
    check_integer("max_steps", max_steps, least=1)
    return _integrate(
        params,
        log_times,
        jnp.asarray(start_log_time, dtype),
        rtol,
        tolerance * _small_size(params) if atol is None else atol,
        diffrax.Tsit5() if solver is None else solver,
        record,
        max_steps,
        progress,
    )


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _integrate(params, log_times, start, rtol, atol, solver, record, max_steps, progress):
    dtype = log_times.dtype

    def observe(state):
        recorded = state if record is None else record(state)
        drift = invariant_drift(state, params)
        return jax.tree.map(jnp.asarray, (recorded, log_cross_entropy(state), drift))

    def save(_x, state, _args):
        # The solver fills what it does not reach with infinity, which integers lack.
        return jax.tree.map(
            lambda leaf: leaf if _is_inexact(leaf) else leaf.astype(dtype), observe(state)
        )

    sound = jnp.all(log_times[1:] > log_times[:-1]) & (log_times[0] >= start)
    sound &= log_times[-1] < jnp.inf
    x_start = _clock(start)
    stand_in = x_start + jnp.arange(log_times.size, dtype=dtype)
    x_save = jnp.where(sound, _clock(log_times), stand_in)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        t0=x_start,
        t1=x_save[-1],
        dt0=_FIRST_STEP * jnp.exp(-x_start),
        y0=params,
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(ts=x_save, fn=save), diffrax.SubSaveAt(t1=True)]
        ),
        stepsize_controller=diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            norm=_finite_or_infinite_norm,
            force_dtmin=False,
            dtmin=16 * float(jnp.finfo(dtype).eps) * jnp.maximum(1, x_save[-1]),
        ),
        max_steps=max_steps,
        throw=False,
        progress_meter=(
            diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()
        ),
    )
    reached = jnp.isfinite(solution.ts[0]) & sound
    recorded, log_loss, drift = jax.tree.map(
        partial(_nan_unless, reached), solution.ys[0], jax.eval_shape(observe, params)
    )
    result = jnp.where(sound, _result_code(solution.result), BAD_TIMES).astype(jnp.int32)
    succeeded = jnp.atleast_1d(result == SUCCESS)
    final = jax.tree.map(partial(_nan_unless, succeeded), solution.ys[1], params)
    return FlowSolution(
        log_times=log_times,
        params=recorded if record is None else None,
        recorded=None if record is None else recorded,
        log_loss=log_loss,
        drift=drift,
        final=jax.tree.map(lambda leaf: leaf[-1], final),
        num_steps=solution.stats["num_steps"],
        num_rejected=solution.stats["num_rejected_steps"],
        result=result,
    )


def _clock(log_times: Array) -> Array:
    """`x = log(1 + log(1 + t))` of `log t`."""
    return jnp.log1p(jax.nn.softplus(log_times))


def _field(x, params, _args):
    """`dZ/dx` of `gradient_flow`."""
    u = jnp.expm1(x)
    log_loss, gradient = jax.value_and_grad(log_cross_entropy)(params)
    speed = (1 + u) * jnp.exp(u + log_loss)
    return jax.tree.map(lambda leaf: -speed * leaf, gradient)


def _finite_or_infinite_norm(error) -> Array:
    """Root mean square, with NaN as infinity: a trial step that overflows is rejected."""
    norm = jnp.sqrt(squared_norm(error) / sum(leaf.size for leaf in error))
    return jnp.where(jnp.isnan(norm), jnp.inf, norm)


def _nan_unless(reached: Array, leaf: Array, like) -> Array:
    """`leaf` (T, ...) in the dtype of `like`, NaN or 0 in the rows not reached."""
    rows = reached.reshape(reached.shape + (1,) * (leaf.ndim - 1))
    missing = jnp.asarray(jnp.nan if _is_inexact(like) else 0, leaf.dtype)
    return jnp.where(rows, leaf, missing).astype(like.dtype)


def _is_inexact(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _small_size(params: Params) -> Array:
    """Root mean square of the entries where below 1, else 1."""
    count = sum(leaf.size for leaf in params)
    least = float(jnp.finfo(params.W.dtype).tiny) ** 0.5
    return jnp.clip(jnp.sqrt(squared_norm(params) / count), least, 1)


def _result_code(result: diffrax.RESULTS) -> Array:
    """Result of diffrax as SUCCESS, STEP_LIMIT or STEP_TOO_SMALL."""
    success = result == diffrax.RESULTS.successful
    limit = result == diffrax.RESULTS.max_steps_reached
    code = jnp.where(success, SUCCESS, jnp.where(limit, STEP_LIMIT, STEP_TOO_SMALL))
    return code.astype(jnp.int32)


def _check_log_times(log_times, start_log_time: float, dtype) -> Array:
    """`log_times` (T,) in `dtype`, once they are known to increase from the start on."""
    given = jnp.asarray(log_times)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(
            f"log_times must be a non-empty vector (T,), got shape {given.shape}"
        )
    cast = given.astype(dtype)
    if not isinstance(given, jax.core.Tracer):
        values = np.asarray(cast)
        if np.isnan(values).any() or values[-1] == np.inf:
            raise ValueError(f"log_times must be numbers below infinity, got {values}")
        if not np.all(values[1:] > values[:-1]):
            raise ValueError(f"log_times must strictly increase (in {dtype}), got {values}")
        if not values[0] >= start_log_time:
            raise ValueError(
                f"log_times must not lie before start_log_time = {start_log_time}, "
                f"got {values[0]}"
            )
    return cast


def invariant_drift(params: Params, start: Params) -> InvariantDrift:
    r"""Change of the flow's invariants between two points of one trajectory, relative.

    $W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and $\sum_k w_k$ are conserved, so what
    they move by is the solver's own error.

    Args:
      params: state `Z`, `W` (K, d) and `H` (K, n, d).
      start: earlier state `Z_0` of the same shapes.

    Returns:
      `InvariantDrift` of scalars, in units of `|Z|²` and `|Z|`.
    """
    size = squared_norm(params)
    moved = balance(params) - balance(start)
    sums = jnp.sum(params.W, axis=0) - jnp.sum(start.W, axis=0)
    return InvariantDrift(
        balance=jnp.linalg.norm(moved) / size,
        classifier_sum=jnp.linalg.norm(sums) / jnp.sqrt(size),
    )


class DescentSolution(NamedTuple):
    """Gradient descent at the T step counts asked for."""

    steps: Array  # (T,)    number of steps taken (int32)
    log_times: Array  # (T,)    log of steps x step size, the flow's log t
    params: Params | None  # (T, ...) state, None where `record` was given
    recorded: Any  # (T, ...) record(params), None where it was not given
    log_loss: Array  # (T,)    log L
    final: Params  # state after the last step


def gradient_descent(
    params: Params,
    step_size: float,
    num_steps: int,
    *,
    save_steps=None,
    record: Callable[[Params], Any] | None = None,
) -> DescentSolution:
    r"""Gradient descent $Z_{s+1} = Z_s - \eta \nabla \mathcal L(Z_s)$, one compiled loop.

    The explicit Euler discretisation of `gradient_flow`, with $t = s \eta$: what the
    paper's own simulations run. To come as far as log t = 20 it needs $e^{20} / \eta$
    steps.

    Args:
      params: start, `W` (K, d) and `H` (K, n, d).
      step_size: eta, positive.
      num_steps: number of steps, at least 1.
      save_steps: (T,) strictly increasing step counts in [0, num_steps] at which the state
        is saved; about 200 spaced evenly in the logarithm, `num_steps` the last, if None.
      record: function of the state whose value is saved instead of the state.

    Returns:
      `DescentSolution`.

    Raises:
      ValueError: shapes or dtypes do not fit, a number is out of range, save_steps do not
        increase, or (outside jit) params hold NaN or infinity.

    Source: Ji et al. (ICLR 2022), Section 3 (simulations).

    >>> import jax, ncjax
    >>> start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    >>> ncjax.gradient_descent(start, 0.1, 1000).params.H.shape[1:]
    (3, 2, 4)
    """
    params = check_params(params, finite=True)
    check_integer("num_steps", num_steps, least=1)
    if num_steps >= 2**31:
        raise ValueError(f"num_steps must be below 2**31, got {num_steps}")
    check_positive("step_size", step_size)
    if save_steps is None:
        save_steps = np.unique(np.geomspace(1, num_steps, 200).round().astype(np.int32))
    steps = np.asarray(save_steps)
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
        jnp.asarray(step_size, params.W.dtype),
        jnp.asarray(steps, jnp.int32),
        jnp.asarray(num_steps, jnp.int32),
        record,
    )


@partial(jax.jit, static_argnums=4)
def _descend(params, step_size, steps, num_steps, record):
    def step(_index, state):
        gradient = jax.grad(cross_entropy)(state)
        return jax.tree.map(lambda leaf, g: leaf - step_size * g, state, gradient)

    def until_saved(carry, target):
        state, done = carry
        state = jax.lax.fori_loop(done, target, step, state)
        recorded = state if record is None else record(state)
        return (state, target), (recorded, log_cross_entropy(state))

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
