"""The methods of `gradient_flow` in one table, and the choice among them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from ncjax.arrays import read_array
from ncjax.checks import check_choice
from ncjax.flow import settle, steps
from ncjax.flow.clock import LINEARLY_IMPLICIT
from ncjax.flow.stabilised import Stabilised4
from ncjax.flow.unchecked import without_checks
from ncjax.peeled.points import as_deep
from ncjax.types import Array, DeepParams, Params


class Finish(NamedTuple):
    """How a method improves the states that the solver interpolates at saved times."""

    # Length of x before a saved time where the state to start from is kept.
    lead: float
    # (x_before, before, x, interpolated, *, rtol, atol, initial, loss) -> Z at x
    improve: Callable[..., Params | DeepParams]


class Method(NamedTuple):
    """A solver for the flow on the clock x, and all that depends on the solver."""

    solver: diffrax.AbstractSolver
    first_step: Callable[[Array, Array], Array]  # of the first x and of the last
    pcoeff: float = 0.0  # of the step size controller, proportional
    icoeff: float = 1.0  # and integral
    finish: Finish | None = None  # None keeps the interpolated states
    needs_curvature: bool = False  # of the cross entropy, by `block_solve`

    def solve(self, field, *, rtol, atol, least_step, progress: bool, **options) -> Any:
        """Return `diffrax.Solution` of `dy/dt = field(t, y, args)`, also of a failed solve.

        Args:
          field: right-hand side of the equation.
          rtol: relative tolerance of a step.
          atol: absolute tolerance of a step.
          least_step: length of a step below which the solve ends.
          progress: show a tqdm bar.
          **options: t0, t1, dt0, y0, args, saveat and max_steps of `diffrax.diffeqsolve`.
        """
        meter = diffrax.TqdmProgressMeter() if progress else diffrax.NoProgressMeter()
        controller = diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            pcoeff=self.pcoeff,
            icoeff=self.icoeff,
            norm=steps.finite_or_infinite_norm,
            force_dtmin=False,
            dtmin=least_step,
        )

        def solve():
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                self.solver,
                stepsize_controller=controller,
                throw=False,
                progress_meter=meter,
                **options,
            )

        return without_checks(solve)


METHODS = {
    "explicit": Method(diffrax.Tsit5(), steps.first_explicit_step),
    # Stability bounds the step, not accuracy: a controller of the last two errors rejects a
    # third as many steps as a controller of the last error alone.
    "stabilised": Method(Stabilised4(), steps.first_explicit_step, pcoeff=0.3, icoeff=0.4),
    "implicit": Method(
        LINEARLY_IMPLICIT,
        steps.first_implicit_step,
        finish=Finish(settle.LENGTH, settle.settle),
        needs_curvature=True,
    ),
}
SOLVERS = ("auto", *METHODS)

# Thresholds measured by benchmarks/flow.py. From this log t on the stabilised solver is
# faster than the explicit one, at this rtol or a larger one: at a smaller rtol accuracy
# bounds the step of a method of order 4, not stability.
_STABILISED_FROM = 2e3
_STABILISED_RTOL = 1e-9
# From this log t on the implicit solver is the fastest. If its systems, of K d unknowns or
# of all entries of several layers, are larger than _IMPLICIT_SIZE, the threshold grows with
# the square of their size.
_IMPLICIT_FROM = 3e4
_IMPLICIT_SIZE = 150
_LARGEST_SYSTEM = 2000


def choose_solver(
    num_classes: int,
    dim: int,
    log_t_max: float,
    dtype,
    rtol: float | None = None,
    *,
    focal: bool = False,
) -> str:
    """Return the name of the fastest solver, as `gradient_flow` with "auto" chooses it.

    Args:
      num_classes: K.
      dim: d.
      log_t_max: natural logarithm of the last time.
      dtype: float32 or float64.
      rtol: relative tolerance of a step, None for the default.
      focal: whether the loss is the focal loss, which has no implicit solver.

    Returns:
      A key of METHODS.
    """
    return _choose(num_classes * dim, log_t_max, dtype, rtol, focal)


def choose_solver_for(
    params: Params | DeepParams,
    log_t_max: float,
    rtol: float | None = None,
    *,
    focal: bool = False,
) -> str:
    """Return the name of the fastest solver for a start of any depth.

    Args:
      params: start without a leading axis; its shapes and its dtype decide.
      log_t_max: natural logarithm of the last time.
      rtol: relative tolerance of a step, None for the default.
      focal: whether the loss is the focal loss, which has no implicit solver.

    Returns:
      A key of METHODS.
    """
    layers, H = as_deep(params)
    end_to_end = layers[-1].shape[0] * H.shape[-1]
    size = max(sum(W.size for W in layers), end_to_end)
    return _choose(size, log_t_max, H.dtype, rtol, focal)


def _choose(size: int, log_t_max: float, dtype, rtol: float | None, focal: bool) -> str:
    """Return the name of the fastest solver for systems of `size` unknowns."""
    far = log_t_max >= _IMPLICIT_FROM * max(1.0, size / _IMPLICIT_SIZE) ** 2
    small = size <= _LARGEST_SYSTEM and jnp.dtype(dtype) == jnp.float64
    if far and small and not focal:
        return "implicit"
    loose = rtol is None or rtol >= _STABILISED_RTOL
    return "stabilised" if loose and log_t_max >= _STABILISED_FROM else "explicit"


def find_method(
    solver: str | diffrax.AbstractSolver,
    params: Params | DeepParams,
    log_times,
    rtol,
    *,
    focal: bool = False,
) -> Method:
    """Return the method that `solver` names or is; other solvers get explicit settings.

    Raises:
      ValueError: solver is neither a diffrax solver nor one of SOLVERS, or it is implicit
        and the loss is the focal loss.
    """
    method = _find_method(solver, params, log_times, rtol, focal)
    if focal and method.needs_curvature:
        raise ValueError(
            'solver "implicit" has the Hessian of the cross entropy alone, got the focal '
            'loss: use solver="auto"'
        )
    return method


def _find_method(
    solver, params: Params | DeepParams, log_times, rtol, focal: bool
) -> Method:
    if isinstance(solver, diffrax.AbstractSolver):
        other = METHODS["explicit"]._replace(solver=solver)
        return next((m for m in METHODS.values() if m.solver == solver), other)
    check_choice("solver", solver, SOLVERS)
    if solver == "auto":
        # Not converted to an array: under jit that would trace even known times.
        traced = any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(log_times))
        last = 0.0 if traced else float(read_array("log_times", log_times)[-1])
        tolerance = 0.0 if isinstance(rtol, jax.core.Tracer) else float(rtol)
        solver = choose_solver_for(params, last, tolerance, focal=focal)
    return METHODS[solver]
