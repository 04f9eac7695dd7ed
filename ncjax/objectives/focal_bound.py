r"""Lower bound of objectives with the focal loss, which is not convex in the logits.

Let $t_a$ be the own logit of a sample minus the mean of the others, and $\psi(t)$ its loss
if the others are equal, the least at this t. With balanced classes $|\sum_a t_a| \le
\tfrac{K \sqrt n}{K - 1} |M|_*$, hence for every multiplier $\nu$

$$\sum_a \ell_a + \nu \Bigl|\sum_a t_a\Bigr| \ge K n\, (\psi(m) + \nu m), \qquad
-\psi'(m) = \nu \le 1,$$

because the line through $(m, \psi(m))$ with slope $-\nu$ lies below $\psi$. Collapse with
margin m attains the bound. A bias drops out, since it sums to zero in $\sum_a t_a$.
"""

import jax
import jax.numpy as jnp

from ncjax.objectives.bounds import Bound, bisect, largest_nuclear_norm
from ncjax.objectives.objective import Objective
from ncjax.types import Array


def focal_bound(objective: Objective, params) -> Bound:
    r"""Return the bound; its theta is the share of the multiplier that gives it.

    Args:
      objective: with the focal loss and weight decay, a ball or a temperature.
      params: point with n samples in every class, of which only the shape matters.
    """
    num_classes, per_class, _ = params.H.shape
    samples = num_classes * per_class
    gamma = objective.gamma
    if objective.weight_decay is not None:
        nu = objective.mu * (num_classes - 1) / (num_classes * per_class**0.5)
        at_zero = _slope(jnp.zeros_like(nu), gamma, num_classes)
        used = jnp.minimum(nu, jnp.minimum(at_zero, 1))
        margin = _margin(used, gamma, num_classes)
        value = samples * (_loss(margin, gamma, num_classes) + used * margin)
        return Bound(value, used / jnp.where(nu > 0, nu, 1))
    tau = largest_nuclear_norm(objective, params, None)
    largest = tau / ((num_classes - 1) * per_class**0.5)  # mean of t at most
    used = jnp.minimum(_slope(largest, gamma, num_classes), 1)
    margin = _margin(used, gamma, num_classes)
    loss = _loss(margin, gamma, num_classes) + used * (margin - largest)
    return Bound(samples * loss, used)


def _loss(margin: Array, gamma, num_classes: int) -> Array:
    """`ψ(t)`."""
    a = jnp.log(num_classes - 1) - margin
    return jnp.exp(gamma * jax.nn.log_sigmoid(a)) * jax.nn.softplus(a)


def _slope(margin: Array, gamma, num_classes: int) -> Array:
    """`-ψ'(t)`, which exceeds 1 left of its maximum and decreases to 0 right of it."""
    a = jnp.log(num_classes - 1) - margin
    p, rest = jax.nn.sigmoid(-a), jax.nn.sigmoid(a)
    power = jnp.exp(gamma * jax.nn.log_sigmoid(a))
    return power * (rest + gamma * p * jax.nn.softplus(a))


def _margin(slope: Array, gamma, num_classes: int) -> Array:
    """Return the m >= 0 with `-ψ'(m) = slope`, from `-ψ' <= (1 + γ) e^((γ + 1) a)`."""
    slope = jnp.maximum(slope, float(jnp.finfo(slope.dtype).tiny))  # it may underflow
    furthest = (jnp.log1p(gamma) - jnp.log(slope)) / (gamma + 1)
    high = jnp.maximum(jnp.log(num_classes - 1) + furthest, 0)
    return bisect(
        lambda m: _slope(m, gamma, num_classes) - slope, jnp.zeros_like(high), high
    )
