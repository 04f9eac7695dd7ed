r"""Lower bounds of the minimum of an objective, from the slopes G at any point.

A convex loss of the logits lies above its tangents. With the share $\theta \in [0, 1]$ of
the slopes, the cross entropy against targets T at probabilities p gives

$$\sum_a \ell_a(z_a) \ge \theta \langle G, z \rangle
+ \sum_a \omega_a \operatorname{Ent}(\theta p_a + (1 - \theta) T_a),$$

and the squared error $\theta \langle G, z - Y \rangle - \theta^2 \sum_a |G_a|^2 / (2
\omega_a)$. Minimisation of the linear term plus the regularisation leaves

| objective | its cost |
| --- | --- |
| weight decay | 0 for $\theta \sigma_{\max}(G) \le \mu$ |
| ball | $\theta \tau \sigma_{\max}(G)$ |
| temperature | the same with $\tau = t_0 \sqrt{K N}$ |
| fixed classifier, decay | $\theta^2 \lvert W^\top G\rvert^2 / (2 \lambda_H)$ |
| fixed classifier, ball | $\theta \sqrt b\, \lvert W^\top G\rvert$ |
| fixed classifier, temperature | $\theta t_0 \sum_a \lvert \hat W^\top G_a\rvert$ |
| bias | $\theta^2 \lvert \sum_a G_a\rvert^2 / (2 \lambda_b)$ |
| free bias | $\theta r \lvert \sum_a G_a\rvert_1$ |

With a free bias the slopes are taken at the best bias, where their sum is 0 up to rounding.
No optimal bias has an entry beyond r, so the rounding costs r times its size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, xlog1py, xlogy

from ncjax.numerics import einsum, root
from ncjax.objectives.free_bias import total_weight
from ncjax.objectives.objective import Objective, unit_rows
from ncjax.types import Array

# Halvings of an interval, to the rounding of float64.
_HALVINGS = 54


class Bound(NamedTuple):
    """Lower bound of the minimum, and the share of the slopes that gives it."""

    value: Array  # ()
    theta: Array  # ()


class _Cost(NamedTuple):
    """The cost `linear θ + quadratic θ² / 2 - constant` of a share θ <= most."""

    linear: Array
    quadratic: Array
    constant: Array
    most: Array


def lower_bound(
    objective: Objective,
    params,
    weights: Array | None,
    slopes: Array,
    sigma_max: Array,
    free_bias: bool,
) -> Bound:
    """Return the best bound from the multiples of the slopes.

    The bound is valid for every theta, so the rounding of the best theta is harmless.

    Args:
      objective: with cross entropy, label smoothing or squared error.
      params: point that is checked already; with a free bias, the best bias.
      weights: (K, n) weights or None.
      slopes: G (K, n, K) at the point.
      sigma_max: largest singular value of G.
      free_bias: whether the decay of the bias is 0.
    """
    cost = _cost(objective, params, weights, slopes, sigma_max, free_bias)
    squared = objective.loss == "squared_error"
    of_loss = _squared_error_bound if squared else _entropy_bound
    value, slope = of_loss(objective, slopes, weights)

    def total(theta):
        return value(theta) - theta * (cost.linear + cost.quadratic * theta / 2)

    def total_slope(theta):
        return slope(theta) - cost.linear - cost.quadratic * theta

    inner = bisect(total_slope, jnp.zeros_like(cost.most), cost.most)
    thetas = jnp.stack([inner, cost.most, jnp.zeros_like(inner)])
    totals = jnp.stack([total(theta) for theta in thetas])
    best = jnp.argmax(totals)
    return Bound(totals[best] + cost.constant, thetas[best])


def bisect(decreasing, low: Array, high: Array) -> Array:
    """Return the zero of a decreasing function in an interval, or the nearer end."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        right = decreasing(middle) > 0
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return (low + high) / 2


def largest_nuclear_norm(objective: Objective, params, weights: Array | None) -> Array:
    r"""Return tau, the bound of a ball or a temperature on $|M|_*$."""
    if objective.temperature is None:
        return jnp.asarray(objective.tau)
    count = num_samples(params, weights)
    return objective.temperature * jnp.sqrt(len(params.W) * count)


def num_samples(params, weights: Array | None) -> Array:
    """Return N, the number of samples of positive weight, as a float."""
    kept = None if weights is None else (weights > 0).astype(weights.dtype)
    return total_weight(params, kept)


def _entropy_bound(objective: Objective, slopes: Array, weights: Array | None):
    """Return the bound of cross entropy as a function of theta, and its derivative.

    The probability of the own class is 1 minus the sum of the others, of which the
    logarithm keeps its digits.
    """
    num_classes = slopes.shape[0]
    others = ~jnp.eye(num_classes, dtype=bool)[:, None, :]
    smoothing = 0.0 if objective.smoothing is None else objective.smoothing
    relative, by_sample = _relative(slopes, weights)
    relative = jnp.where(others, relative, 0)
    own = -jnp.sum(relative, axis=-1)

    def mixture(theta):
        mixed = smoothing / num_classes + theta * relative
        mixed = jnp.where(others, jnp.maximum(mixed, 0), 0)
        return mixed, jnp.minimum(jnp.sum(mixed, axis=-1), 1)

    def value(theta):
        mixed, rest = mixture(theta)
        entropies = jnp.sum(entr(mixed), axis=-1) - xlog1py(1 - rest, -rest)
        return jnp.sum(by_sample * entropies)

    def slope(theta):
        mixed, rest = mixture(theta)
        slopes = jnp.sum(xlogy(relative, mixed), axis=-1) + xlog1py(own, -rest)
        return -jnp.sum(by_sample * slopes)

    return value, slope


def _squared_error_bound(_objective, slopes: Array, weights: Array | None):
    """Return the bound of squared error as a function of theta, and its derivative."""
    relative, by_sample = _relative(slopes, weights)
    along = -jnp.sum(jnp.diagonal(slopes, axis1=0, axis2=2))
    size = jnp.sum(by_sample * jnp.sum(relative**2, axis=-1))
    return (
        lambda theta: theta * (along - theta * size / 2),
        lambda theta: along - theta * size,
    )


def _relative(slopes: Array, weights: Array | None) -> tuple[Array, Array]:
    """Return `G_a / ω_a` (K, n, K), 0 for samples left out, and the weights (K, n)."""
    if weights is None:
        return slopes, jnp.ones(slopes.shape[:2], slopes.dtype)
    kept = weights > 0
    return slopes / jnp.where(kept, weights, 1)[..., None], weights


def _cost(objective, params, weights, slopes, sigma_max, free_bias) -> _Cost:
    zero, one = jnp.zeros_like(sigma_max), jnp.ones_like(sigma_max)
    if objective.fixed_classifier:
        cost = _cost_of_features(objective, params, slopes)
    elif objective.weight_decay is not None:
        most = jnp.where(sigma_max > objective.mu, objective.mu / sigma_max, one)
        cost = _Cost(zero, zero, zero, most)
    else:
        tau = largest_nuclear_norm(objective, params, weights)
        cost = _Cost(tau * sigma_max, zero, zero, one)
    if objective.bias is None:
        return cost
    in_bias = jnp.sum(slopes, axis=(0, 1))
    if free_bias:
        reach = _reach_of_bias(objective, params, weights)
        return cost._replace(linear=cost.linear + reach * jnp.sum(jnp.abs(in_bias)))
    # A traced decay may be 0. The share 0 then gives the bound, which this keeps finite.
    decay = jnp.maximum(objective.bias, float(jnp.finfo(slopes.dtype).tiny))
    quadratic = cost.quadratic + jnp.sum(in_bias**2) / decay
    largest = float(jnp.finfo(slopes.dtype).max) / 4
    return cost._replace(quadratic=jnp.minimum(quadratic, largest))


def _cost_of_features(objective: Objective, params, slopes: Array) -> _Cost:
    """Return the cost at a fixed classifier, where H alone moves."""
    zero = jnp.zeros((), slopes.dtype)
    W = params.W
    if objective.temperature is not None:
        W = objective.temperature * unit_rows(W)
    pulls = jnp.sum(einsum("kij,jd->kid", slopes, W) ** 2, axis=-1)
    if objective.temperature is not None:
        return _Cost(jnp.sum(root(pulls)), zero, zero, zero + 1)
    pull = jnp.sum(pulls)
    if objective.ball is not None:
        return _Cost(root(objective.ball[1] * pull), zero, zero, zero + 1)
    assert objective.weight_decay is not None  # the last of the three
    decay_W, decay_H = objective.weight_decay
    constant = decay_W / 2 * jnp.sum(W**2)
    return _Cost(zero, pull / decay_H, constant, zero + 1)


def _reach_of_bias(objective: Objective, params, weights: Array | None) -> Array:
    r"""Return a bound on the entries of an optimal free bias.

    The slopes at the best bias sum to zero up to rounding. The rest r costs at most
    $|r|_1$ times this bound. The loss of an optimum is at most the loss of zero logits,
    which bounds each margin from below; the regularisation bounds the logits without bias.
    """
    num_classes = len(params.W)
    squared = objective.loss == "squared_error"
    per_weight = 0.5 if squared else jnp.log(num_classes)
    level = per_weight * total_weight(params, weights)
    heaviest = 1.0 if weights is None else jnp.min(jnp.max(weights, axis=1))
    smoothing = 0.0 if objective.smoothing is None else objective.smoothing
    target = 1 - smoothing + smoothing / num_classes  # of the own class
    worst = level / (heaviest * target)
    reach = 1 + jnp.sqrt(2 * worst) if squared else worst
    return reach + 2**0.5 * _reach_of_logits(objective, params, level)


def _reach_of_logits(objective: Objective, params, level: Array) -> Array:
    """Return a bound on the operator norm of the optimal `W Hᵀ`."""
    if not objective.fixed_classifier:
        return level / objective.mu if objective.ball is None else objective.tau
    if objective.weight_decay is not None:
        features = jnp.sqrt(2 * level / objective.weight_decay[1])
    else:
        assert objective.ball is not None  # a temperature has no bias
        features = jnp.sqrt(objective.ball[1])
    return jnp.sqrt(jnp.sum(params.W**2)) * features
