"""What the implicit method does at a saved time: two short steps, then the invariants."""

import diffrax
import jax
import jax.numpy as jnp

from ncjax.flow.clock import LINEARLY_IMPLICIT, field, unscaled
from ncjax.flow.invariants import restore
from ncjax.flow.steps import finite_or_infinite_norm
from ncjax.peeled.kernels import log_cross_entropy, squared_norm
from ncjax.types import Array, Params

# The implicit solver takes two steps over this length of x up to each time asked for.
LENGTH = 0.03
# log t from which the norm can be read off the time to the digits that the flow has.
_EQUILIBRIUM_FROM = 1e6


def settle(x_before, before, x, interpolated, *, rtol, atol, initial: Params) -> Params:
    """State `Z` at `x` from `Y` interpolated there and a little before.

    What the loss holds fast is off by an error of the long step that was interpolated,
    which grows with log t in a margin. Two short steps damp it out. Where the state
    itself moves too fast for them the solver has made its own steps short.
    """

    def step(carry, ends):
        (scaled, worst), (low, high) = carry, ends
        scaled, error, *_ = LINEARLY_IMPLICIT.step(
            diffrax.ODETerm(field), low, high, scaled, None, None, False
        )
        error = jax.tree.map(lambda e, y: e / (atol + rtol * jnp.abs(y)), error, scaled)
        return (scaled, jnp.maximum(worst, finite_or_infinite_norm(error))), None

    middle = (x_before + x) / 2
    ends = jnp.stack([x_before, middle]), jnp.stack([middle, x])
    # A loop, so that the step is compiled once.
    start = (_on_loss(x_before, before), jnp.zeros((), x.dtype))
    (scaled, worst), _ = jax.lax.scan(step, start, ends)
    scaled = jax.tree.map(
        lambda settled, plain: jnp.where(worst <= 1, settled, plain), scaled, interpolated
    )
    return restore(unscaled(x, scaled), initial)


def _on_loss(x: Array, scaled: Params) -> Params:
    r"""`Y` with the norm at which the loss is in equilibrium, far out only.

    $d(u + \log \mathcal L)/dx = (1 + u)(1 - e^{u + \log \mathcal L} |\nabla \log \mathcal
    L|^2)$ pulls the bracket to zero at the rate u. Once u exceeds 1e6 the bracket is within
    1e-6 of it, and an error of the norm in its tenth digit moves it by more: one step of
    Newton's method in the norm.
    """
    u = jnp.expm1(x)
    params = unscaled(x, scaled)
    log_loss, slope = jax.value_and_grad(log_cross_entropy)(params)
    excess = u + log_loss + jnp.log(squared_norm(slope))
    radial = sum(jnp.sum(p * g) for p, g in zip(params, slope, strict=True))
    factor = jnp.where(u > _EQUILIBRIUM_FROM, 1 - excess / radial, 1)
    return jax.tree.map(lambda leaf: factor * leaf, scaled)
