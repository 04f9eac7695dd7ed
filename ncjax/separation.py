"""Minimum-norm separation: how near a point is to a KKT direction."""

import jax
import jax.numpy as jnp

from ncjax.geometry import squared_norm
from ncjax.losses import log_cross_entropy
from ncjax.types import Array, Params


def kkt_angle(params: Params) -> Array:
    r"""Sine of the angle between `Z` and $-\nabla \mathcal L(Z)$, 0 at a KKT direction.

    $$\sqrt{1 - \beta^2}, \qquad
    \beta = \frac{\langle Z, -\nabla \mathcal L \rangle}{|Z| |\nabla \mathcal L|}$$

    computed as the share of the gradient that is tangent to the sphere, so that small
    angles keep their digits. NaN at the origin.

    Args:
      params: `W` (K, d) and `H` (K, n, d).

    Returns:
      Scalar in [0, 1].

    Raises:
      ValueError: shapes or dtypes do not fit.

    Source: Ji et al. (ICLR 2022), Theorem 3.2: along the flow beta tends to 1.
    """
    gradient = jax.grad(log_cross_entropy)(params)
    inner = sum(jnp.vdot(g, z) for g, z in zip(gradient, params, strict=True))
    radial = inner / squared_norm(params)
    tangent = jax.tree.map(lambda g, z: g - radial * z, gradient, params)
    return jnp.sqrt(squared_norm(tangent) / squared_norm(gradient))
