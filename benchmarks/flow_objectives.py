"""Time flows of objectives with weight decay, and flows with weights of samples.

K = 10, n = 5, d = 20 in float64; starts are drawn from N(0, 0.1²).

**Weight decay**: 32 starts follow dZ/dt = -∇F for cross entropy with decay 0.1 of both
factors to t = 150, where F is within 1e-10 of its minimum. Peers: diffrax's Dopri8 with
autodiff under vmap, and SciPy's L-BFGS-B with a NumPy gradient, start after start, which
minimises without a flow. The note has the largest F - min F over the starts.

**Weights**: the flow of one start to log t = 10 000 without weights, with weights of 1, and
with 30 % of the samples left out by weight 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]

import ncjax
from benchmarks._timing import Program, interleave, rows, warm_up
from benchmarks.flow import SHAPE, draw, numpy_gradient, solve_with_diffrax

DECAY = 0.1
UFM = ncjax.Objective("cross_entropy", weight_decay=(DECAY, DECAY))


def measure(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes."""
    return [*decay(repeats), *weights(repeats)], []


def decay(repeats: int, count: int = 32, end: float = 150.0) -> list[dict[str, Any]]:
    """Return rows of many starts with weight decay, followed to the minimum."""
    keys = jax.random.split(jax.random.key(0), count)
    starts = jax.vmap(lambda key: ncjax.init_params(key, *SHAPE, dtype=jnp.float64))(keys)

    def flow(start):
        return ncjax.gradient_flow(start, times=jnp.array([end]), objective=UFM).final

    programs = [
        _program("ncjax, explicit", jax.jit(jax.vmap(flow)), starts),
        _program("Dopri8, autodiff", jax.jit(jax.vmap(partial(_dopri, end))), starts),
        _program("SciPy L-BFGS-B, NumPy gradient", _minimise, starts),
    ]
    warm_up(programs)
    interleave(programs, repeats)
    return rows(f"{count} starts with decay {DECAY} to the minimum", programs)


def _program(name: str, solve: Callable, starts) -> Program:
    """Return a program with the largest distance to the minimum in its note."""
    num_classes, per_class, dim = SHAPE
    least = ncjax.minimiser(UFM, (per_class,) * num_classes, dim).value

    def call(_repeat: int):
        return jax.block_until_ready(solve(starts))

    def warm():
        worst = float(jnp.max(jax.vmap(UFM)(call(0)))) - least
        program.note = f"F - min F at most {worst:.0e}"

    program = Program(name, call, warm)
    return program


def _dopri(end: float, start):
    def field(_t, params, _args):
        return jax.tree.map(jnp.negative, jax.grad(UFM)(params))

    return solve_with_diffrax(field, diffrax.Dopri8(), end, start)


def _minimise(starts):
    found = [
        _minimise_one(*leaves) for leaves in zip(*map(np.asarray, starts), strict=True)
    ]
    return ncjax.Params(*(jnp.asarray(np.stack(leaf)) for leaf in zip(*found, strict=True)))


def _minimise_one(W: np.ndarray, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def unravel(flat):
        return flat[: W.size].reshape(W.shape), flat[W.size :].reshape(H.shape)

    def value_and_gradient(flat):
        W, H = unravel(flat)
        logits = H @ W.T
        own = np.arange(len(W))
        losses = np.logaddexp.reduce(logits, axis=-1) - logits[own, :, own]
        slopes = numpy_gradient(W, H)
        gradient = np.concatenate([slope.ravel() for slope in slopes]) + DECAY * flat
        return losses.sum() + DECAY / 2 * flat @ flat, gradient

    flat = np.concatenate([W.ravel(), H.ravel()])
    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-8}
    result = minimize(
        value_and_gradient, flat, jac=True, method="L-BFGS-B", options=options
    )
    return unravel(result.x)


def weights(repeats: int, log_t: float = 1e4) -> list[dict[str, Any]]:
    """Return rows of one flow without weights, with weights of 1 and of 0."""
    start, times = draw(), np.geomspace(1, log_t, 50)
    num_classes, per_class, _ = SHAPE
    few = (per_class,) * (num_classes // 2) + (per_class // 2,) * (num_classes // 2)
    given = {
        "no weights": None,
        "weights of 1": jnp.ones((num_classes, per_class)),
        "30 % of the samples left out": ncjax.sample_weights(few),
    }
    programs = [_weighted(name, start, times, values) for name, values in given.items()]
    warm_up(programs)
    interleave(programs, repeats)
    return rows(f"one start to log t = {log_t:g}", programs)


def _weighted(name: str, start, times: np.ndarray, values) -> Program:
    def call(_repeat: int):
        return jax.block_until_ready(ncjax.gradient_flow(start, times, weights=values))

    def warm():
        program.note = f"{int(call(0).num_steps)} steps"

    program = Program(f"ncjax, {name}", call, warm)
    return program
