r"""Margin, alignment and growth of homogeneous networks along the flow of their loss.

The logits of a p-homogeneous network satisfy $f(c \theta) = c^p f(\theta)$ for $c > 0$
(`ncjax.networks.models.degree`). Let $\mathcal L$ be the cross entropy summed over samples,
and $d\theta/dt = -\nabla \mathcal L$. Euler's identity for the margins m of the samples
against all other classes is

$$\langle \theta, \nabla m \rangle = p\, m, \qquad
\langle \theta, -\nabla \mathcal L \rangle = p \sum \Bigl(
-\frac{\partial \mathcal L}{\partial m} \Bigr) m.$$

From the time on at which $\mathcal L < \log 2$, the loss tends to 0, the smoothed
normalised margin does not fall, and $\theta / |\theta|$ tends to the directions of KKT
points of

$$\min \tfrac12 |\theta|^2 \quad \text{subject to all } m \ge 1.$$

Source: Lyu and Li (ICLR 2020); for the conserved differences Du, Hu and Lee (NeurIPS 2018).
The two limits of growth are ncjax's.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ncjax.checks import check_integer
from ncjax.numerics import at_unit_scale, dot, on_device, power_of_two, widen
from ncjax.types import Array

# Below this log L the third term of log expm1(L) = log L + L/2 + L²/24 ... is lost to
# rounding.
_SMALL = -20.0


class Homogeneity(NamedTuple):
    r"""Quantities of a p-homogeneous network at θ. Scalars.

    V is the value $\tfrac12 |\theta|^2$ of the KKT point to whose direction θ tends.
    """

    squared_norm: Array  # |θ|²
    margin: Array  # q_min / |θ|^p; -> (2V)^(-p/2)
    log_margin: Array  # log of margin; NaN unless q_min > 0
    log_smoothed_margin: Array  # log of -log(e^L - 1) / |θ|^p; NaN unless L < log 2
    kkt_angle: Array  # √(1-β²), β = <θ, -∇L> / (|θ| |∇L|); -> 0
    norm_growth: Array  # |θ|² / (log t)^(2/p); -> 2V; NaN unless log t > 0
    loss_growth: Array  # t L (log t)^(2-2/p); -> 2V/p²; NaN unless log t > 0


def homogeneity(
    params: Any,
    slope: Any,
    log_loss: ArrayLike,
    log_time: ArrayLike,
    least_margin: ArrayLike,
    degree: int,
) -> Homogeneity:
    r"""Measure margin, alignment and growth of a p-homogeneous network.

    The normalised margin and its smoothed form are

    $$\gamma = \frac{q_{\min}}{|\theta|^p}, \qquad
    \tilde\gamma = \frac{-\log(e^{\mathcal L} - 1)}{|\theta|^p}, \qquad
    \gamma - \frac{\log (N (K-1))}{|\theta|^p} \le \tilde\gamma \le \gamma.$$

    Gradient flow never lowers $\tilde\gamma$ once $\mathcal L < \log 2$. $\gamma$ itself
    may fall, but not below $\tilde\gamma$. With $\log(1/\mathcal L)$, which belongs to the
    exponential loss, in place of $-\log(e^{\mathcal L} - 1)$ the quotient could fall by a
    share of order $\mathcal L$.

    Towards a KKT point of value V, $|\theta|^2 / (\log t)^{2/p} \to 2V$ and $t\, \mathcal L
    (\log t)^{2-2/p} \to 2V/p^2$. All comes from logarithms, so it stays exact where t, 1/L
    or $|\theta|^p$ overflows.

    Args:
      params: θ, a pytree of floating arrays.
      slope: ∇ log L at θ, or any positive multiple, a pytree like params.
      log_loss: log L, L the sum over samples.
      log_time: log t.
      least_margin: q_min, the least over samples and other classes.
      degree: p.

    Returns:
      `Homogeneity` of scalars, in the dtype of params, float32 for half precision.

    Raises:
      ValueError: degree is not a positive integer, or slope has another structure.

    Source: Lyu and Li (ICLR 2020), Theorems 4.1 and 4.4, and Appendix A for cross entropy.
    """
    check_integer("degree", degree, least=1)
    params, slope = widen(params), widen(slope)
    dtype = jax.tree.leaves(params)[0].dtype
    numbers = (on_device(x, dtype) for x in (log_loss, log_time, least_margin))
    return _homogeneity(params, slope, *numbers, degree=degree)


@partial(jax.jit, static_argnames="degree")
def _homogeneity(params, slope, log_loss, log_time, least_margin, degree) -> Homogeneity:
    unit, squares = power_of_two(params), _inner(*2 * (at_unit_scale(params),))
    log_norm = jnp.log(unit) + jnp.log(squares) / 2
    log_power = degree * log_norm
    log_margin = jnp.log(least_margin) - log_power
    log_size = jnp.log(jnp.abs(least_margin)) - log_power
    log_log_time = jnp.log(log_time)
    return Homogeneity(
        squared_norm=squares * unit * unit,
        margin=jnp.sign(least_margin) * jnp.exp(log_size),
        log_margin=log_margin,
        log_smoothed_margin=jnp.log(_margin_of_loss(log_loss)) - log_power,
        kkt_angle=_angle(params, slope),
        norm_growth=jnp.exp(2 * log_norm - 2 / degree * log_log_time),
        loss_growth=jnp.exp(log_time + log_loss + (2 - 2 / degree) * log_log_time),
    )


def _margin_of_loss(log_loss: Array) -> Array:
    r"""Return $-\log(e^{\mathcal L} - 1)$: one sample with this margin has loss L."""
    small = log_loss < _SMALL
    loss = jnp.exp(log_loss)
    safe = jnp.where(small, 1, loss)
    log_expm1 = safe + jnp.log(-jnp.expm1(-safe))
    return -jnp.where(small, log_loss + loss / 2, log_expm1)


def _angle(params, slope) -> Array:
    """Return the sine of the angle between θ and -∇L: the part of θ orthogonal to ∇L.

    √(1-β²) would lose all digits near β = 1.
    """
    params, slope = at_unit_scale(params), at_unit_scale(slope)
    norm, steepness = (jnp.sqrt(_inner(x, x)) for x in (params, slope))
    along = _inner(params, slope) / norm / steepness
    orthogonal = jax.tree.map(lambda x, g: x / norm - along / steepness * g, params, slope)
    return jnp.sqrt(_inner(orthogonal, orthogonal))


def _inner(left, right) -> Array:
    """Return the inner product of two pytrees."""
    products = jax.tree.map(lambda x, y: dot(x.ravel(), y.ravel()), left, right)
    return jax.tree.reduce(jnp.add, products)


def squared_norm_differences(params: Mapping[str, Any], layers: Sequence[str]) -> Array:
    r"""Return the conserved differences $|\theta_{l+1}|^2 - |\theta_l|^2$, l = 1 to p - 1.

    $\theta_l$ is the kernel of a layer, in the first layer with its bias. The logits are
    homogeneous of degree 1 in each $\theta_l$, hence $\tfrac{d}{dt} |\theta_l|^2 = 2
    \langle \theta_l, -\nabla_l \mathcal L \rangle$ is the same for all layers. A change is
    the error of the solver.

    Args:
      params: parameters of a homogeneous network by the names of its layers.
      layers: the p names, of `ncjax.networks.models.weight_layers`.

    Returns:
      (p - 1,), in the dtype of params, float32 for half precision.

    Raises:
      ValueError: layers are not the keys of params.

    Source: Du, Hu and Lee (NeurIPS 2018), Corollary 2.1.
    """
    if sorted(layers) != sorted(params):
        raise ValueError(
            f"expected the layers {', '.join(params)}, got {', '.join(layers)}"
        )
    wide = widen(dict(params))
    return jnp.diff(jnp.stack([_inner(wide[name], wide[name]) for name in layers]))
