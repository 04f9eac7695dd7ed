"""The finish of the implicit method at a saved time: two short steps, then invariants."""

import diffrax
import jax
import jax.numpy as jnp

from ncjax.flow.clock import LINEARLY_IMPLICIT, Loss, field, unscaled
from ncjax.flow.invariants import restore
from ncjax.flow.steps import finite_or_infinite_norm
from ncjax.peeled.kernels import log_cross_entropy, squared_norm
from ncjax.peeled.points import Point, last_factors
from ncjax.types import Array

# Length of x before a saved time over which the implicit solver takes two steps.
LENGTH = 0.03
# u from which the time determines the norm to all digits that the flow has.
_EQUILIBRIUM_FROM = 1e6


def settle(
    x_before, before, x, interpolated, *, rtol, atol, initial: Point, loss: Loss
) -> Point:
    """Return `Z` at `x`, from `Y` interpolated at `x` and at `x_before`.

    Interpolation within a long step leaves an error in the stiff components; in a margin
    it grows with log t. Two short steps damp it. Where the state moves too fast for these
    steps, the solver's own steps are short, and the interpolated state is kept.
    """

    def step(carry, ends):
        (scaled, worst), (low, high) = carry, ends
        scaled, error, *_ = LINEARLY_IMPLICIT.step(
            diffrax.ODETerm(field), low, high, scaled, loss, None, False
        )
        error = jax.tree.map(lambda e, y: e / (atol + rtol * jnp.abs(y)), error, scaled)
        return (scaled, jnp.maximum(worst, finite_or_infinite_norm(error))), None

    middle = (x_before + x) / 2
    ends = jnp.stack([x_before, middle]), jnp.stack([middle, x])
    # A loop, so that the step is compiled once.
    start = (_on_loss(x_before, before, loss), jnp.zeros((), x.dtype))
    (scaled, worst), _ = jax.lax.scan(step, start, ends)
    scaled = jax.tree.map(
        lambda settled, kept: jnp.where(worst <= 1, settled, kept), scaled, interpolated
    )
    return restore(unscaled(x, scaled), initial)


def _on_loss(x: Array, scaled: Point, loss: Loss) -> Point:
    r"""Return `Y` with the norm at which the loss is in equilibrium, at large u only.

    $d(u + \log \mathcal L)/dx = (1 + u)(1 - e^{u + \log \mathcal L} |\nabla \log \mathcal
    L|^2)$ drives the bracket to zero at the rate u. For u above 1e6 the bracket is below
    1e-6, while an error in the tenth digit of the norm changes it by more. One step of
    Newton's method in the norm removes that error.
    """
    u = jnp.expm1(x)
    params = unscaled(x, scaled)
    log_loss, slope = jax.value_and_grad(
        lambda z: log_cross_entropy(last_factors(z), loss.weights)
    )(params)
    excess = u + log_loss + jnp.log(squared_norm(slope))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(slope), strict=True)
    radial = sum(jnp.sum(p * g) for p, g in pairs)
    factor = jnp.where(u > _EQUILIBRIUM_FROM, 1 - excess / radial, 1)
    return jax.tree.map(lambda leaf: factor * leaf, scaled)
