r"""Minimum-norm separation (P2): multipliers, KKT residuals and certificate of a point.

$$\min \tfrac12 |W|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
(w_k - w_j)^\top h_{k,i} \ge 1 \; (j \ne k)$$

The gradient flow converges in direction to KKT points of this problem. `kkt` measures how
near a point is, also one of several linear layers. `certificate` tells the global optimum
of two factors from a saddle. `optimum` holds the solution.
"""

import math
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ncjax.checks import check_choice
from ncjax.numerics import at_unit_scale, matmul, power_of_two
from ncjax.peeled.kernels import least_margin, separation_value, squared_norm
from ncjax.peeled.multipliers import (
    check_separated,
    combination,
    dual_matrix,
    finite_margins,
    fitted_scale,
    inner,
    least_squares_multipliers,
    log_cross_entropy,
    normalise,
    residual_tolerance,
    softmax_multipliers,
    unit_least_margin,
)
from ncjax.peeled.points import check_any_point, last_factors
from ncjax.peeled.weights import check_point
from ncjax.singular import singular_values, thin_svd
from ncjax.types import Array, DeepParams, Params

# Values of `Certificate.verdict`, and their meanings.
GLOBAL_OPTIMUM = 0
STRICT_SADDLE = 1
NOT_KKT = 2
NOT_SEPARATED = 3
NO_ROOM = 4
VERDICTS = (
    "globally optimal direction",
    "strict saddle direction",
    "not a KKT point",
    "not separated: a sample is misclassified",
    "KKT direction that is not optimal, its descent direction needs a larger dim",
)
MULTIPLIERS = ("softmax", "nnls")

# Bound on |Wᵀu| / |W|_2 at a saddle, where the exact value is 0; u is the top left singular
# vector of S.
_WITHIN = 0.5


class KKT(NamedTuple):
    r"""How near $\tilde Z = Z / q_{\min}^{1/p}$ is to a KKT point of (P2), p factors."""

    multipliers: Array  # (K, n, K)  λ_kij >= 0, zero where j = k or the weight is 0
    stationarity: Array  # ()  |Z̃ - Σ λ ∇m| / |Z̃|
    complementarity: Array  # ()  Σ λ (m̃ - 1) / Σ λ m̃
    infeasibility: Array  # ()  1 - min m̃, zero to rounding
    beta: Array  # ()  <Z, -∇L> / (|Z| |∇L|), tends to 1 along the flow


class Certificate(NamedTuple):
    """Whether a KKT direction is the global optimum; if not, a direction of descent."""

    dual: Array  # (K, K n)  S, column k n + i for sample (k, i)
    sigma_max: Array  # ()  largest singular value of S; at most 1 at the optimum
    bound: Array  # ()  Σλ / max(1, sigma_max), at most the minimum of |Z̃|²/2
    gap: Array  # ()  (|Z̃|²/2 - bound) / v(n)
    excess: Array  # ()  |Z̃|²/2 / v(n) - 1
    direction: Params  # unit tangent direction of the top singular vectors
    residual: Array  # ()  the larger of stationarity and complementarity
    tolerance: Array  # ()  upper bound for residual and for sigma_max - 1
    verdict: Array  # ()  index into VERDICTS (int32)


def kkt(params: Params | DeepParams, weights=None, *, multipliers: str = "softmax") -> KKT:
    r"""Multipliers and KKT residuals of the minimum-norm separation problem.

    With $\tilde Z = Z / q_{\min}^{1/p}$ and its margins $\tilde m$, a KKT point has

    $$\tilde Z = \sum \lambda_{kij} \nabla \tilde m_{kij}, \qquad \lambda_{kij} \ge 0,
    \qquad \lambda_{kij} (\tilde m_{kij} - 1) = 0, \qquad \tilde m_{kij} \ge 1.$$

    Along the flow the softmax weights $\omega_{ki}\, p_{kij} / \mathcal L$ tend to the
    multipliers, up to a scale that is fitted by least squares. Stationarity then equals
    `kkt_angle`. Two factors have p = 2, and `DeepParams` of L layers have p = L + 1.

    W and H may have any common scale at which the logits are finite. If their scales differ
    by more than 1e15 in float32, or 1e120 in float64, multipliers underflow: balance the
    norms first, by `ncjax.balance_norms`. For `DeepParams` the features of every layer must
    be finite too.

    Args:
      params: `W` (K, d) and `H` (K, n, d), or `DeepParams`, with every sample classified
        correctly.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, not negative.
        Samples of weight 0 are left out: they have no margin and no multiplier. None is 1
        everywhere.
      multipliers: "softmax" takes the weights of the loss at this norm, computed in the
        log domain and so valid at any norm. "nnls" takes the minimiser of
        $|\tilde Z - \sum \lambda \nabla \tilde m|^2 + \sum \lambda^2 (\tilde m - 1)^2$ over
        $\lambda \ge 0$ (K n (K-1) unknowns), which depends on the direction alone. On a CPU
        SciPy's active-set solver finds it in float64. On a GPU or TPU the program itself
        finds it in the dtype of `params`; float32 adds up to 1e-5 to the residuals there.
        At a saddle the minimisers may be several, and the two solvers then return
        different ones.

    Returns:
      `KKT`, float32 for half precision; NaN under jit if a sample is misclassified, and on
      a GPU or TPU if "nnls" finds no minimiser: seen for K = 10, n = 5 at 1e-6 from a
      saddle.

    Raises:
      ValueError: shapes, dtypes or weights do not fit, multipliers has another value, or
        (outside jit) a sample is misclassified or params are not finite.

    Source: Ji et al. (ICLR 2022), Theorem 3.2 and Appendix; Lyu, Li (2020).

    >>> import ncjax
    >>> optimum = ncjax.solve_separation(counts=(2, 2, 2), dim=4)
    >>> bool(ncjax.kkt(optimum.params).stationarity < 1e-3)
    True
    """
    check_choice("multipliers", multipliers, MULTIPLIERS)
    params, weights = check_any_point(params, weights, finite=True)
    check_separated(params, weights)
    return _kkt(params, weights, multipliers)


# One compiled program: one for each operation takes several times as long to compile.
@partial(jax.jit, static_argnums=2)
def _kkt(params: Params | DeepParams, weights: Array | None, multipliers: str) -> KKT:
    scaled = normalise(params, weights)
    if multipliers == "softmax":
        found = softmax_multipliers(params, weights)
        found = found * fitted_scale(scaled, found)
    else:
        found = least_squares_multipliers(scaled, weights)
    gradient = at_unit_scale(jax.grad(log_cross_entropy)(params, weights))
    params = at_unit_scale(params)
    lengths = jnp.sqrt(squared_norm(gradient) * squared_norm(params))
    scale = power_of_two(scaled)
    unit, rest = jax.tree.map(
        lambda leaf: leaf / scale,
        (scaled, jax.tree.map(jnp.subtract, scaled, combination(found, scaled))),
    )
    scaled_margins = finite_margins(scaled)
    slack = jnp.sum(found * (scaled_margins - 1)) / jnp.sum(found * scaled_margins)
    return KKT(
        multipliers=found,
        stationarity=jnp.sqrt(squared_norm(rest) / squared_norm(unit)),
        complementarity=slack,
        infeasibility=1 - least_margin(last_factors(scaled), weights),
        beta=-inner(gradient, params) / lengths,
    )


def certificate(
    params: Params,
    weights=None,
    *,
    multipliers: str = "softmax",
    tol: float | None = None,
) -> Certificate:
    r"""Certify that a direction is globally optimal, or give a direction of descent.

    (P2) is the factored form of $\min |M|_*$ subject to margins of $M = W H^\top$ of at
    least 1. Its dual variable is

    $$S = \sum \lambda_{kij} (e_k - e_j) e_{ki}^\top \in \mathbb R^{K \times K n},$$

    KKT reads $\tilde W = S \tilde H$, $\tilde H = S^\top \tilde W$, and the point is a
    global minimiser if and only if $\sigma_{\max}(S) \le 1$. Otherwise the top singular
    vectors u, v and a unit vector a orthogonal to all rows of W and H give the tangent
    direction $(u a^\top, v a^\top) / \sqrt2$ along which the loss on the sphere decreases.

    The dual gives a lower bound of the minimum at any point with positive margins, `bound`.
    `gap` and `excess` are relative to $v(n)$, the minimum for $d \ge K - 1$
    (`separation_value`).

    At a saddle the multipliers need not be unique, and `sigma_max` may depend on them; the
    verdict does not. KKT implies $S S^\top \tilde W = \tilde W$, so u is orthogonal to the
    columns of W if `sigma_max` exceeds 1. If instead $|W^\top u| > |W|_2 / 2$, the
    multipliers are in error, and the verdict is "not a KKT point".

    Args:
      params: `W` (K, d) and `H` (K, n, d) with every sample classified correctly, at
        a scale for which `kkt` is right.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, not negative.
        Samples of weight 0 are left out: they have no margin and no multiplier. None is 1
        everywhere.
      multipliers: as in `kkt`. Softmax weights are right at a large norm on the flow. At
        a point that no flow made, such as a result of `solve_separation`, use "nnls":
        softmax weights of equal margins are equal, at any norm.
      tol: largest residual, and largest `sigma_max - 1`, that count as zero. None takes
        $1/\sqrt{q_{\min}}$, the rate at which the residuals of the flow decay (1/√log t),
        clipped to at most 0.1 and at least 100 roundings.

    Returns:
      `Certificate`, float32 for half precision. `VERDICTS[int(verdict)]` is the verdict in
      words. The direction is NaN if the rows of W and H span the whole space, so that no a
      exists; `jax_debug_nans` reports it.

    Raises:
      ValueError: as `kkt`, or tol is negative.

    Source: ncjax; the nuclear-norm form follows Haeffele, Vidal (2015).

    >>> import ncjax
    >>> saddle = ncjax.block_saddle(num_blocks=2, block_size=2, per_class=1, dim=4)
    >>> far = ncjax.Params(30 * saddle.W, 30 * saddle.H)
    >>> ncjax.VERDICTS[int(ncjax.certificate(far).verdict)]
    'strict saddle direction'
    """
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    check_choice("multipliers", multipliers, MULTIPLIERS)
    params, weights = check_point(params, weights, finite=True)
    check_separated(params, weights)
    return _certificate(params, weights, multipliers, tol)


@partial(jax.jit, static_argnums=2)
def _certificate(
    params: Params, weights: Array | None, multipliers: str, tol: float | None
) -> Certificate:
    conditions = _kkt(params, weights, multipliers)
    optimum = separation_value(params, weights)
    dual = dual_matrix(conditions.multipliers)
    left, singular, right = thin_svd(dual)
    sigma_max = singular[0]
    primal = squared_norm(normalise(params, weights)) / 2
    bound = jnp.sum(conditions.multipliers) / jnp.maximum(1, sigma_max)
    residual = jnp.maximum(conditions.stationarity, jnp.abs(conditions.complementarity))
    tolerance = residual_tolerance(params, weights, tol)
    direction = _descent_direction(params, left[:, 0], right[0], tolerance)
    W = at_unit_scale(params.W)
    within = jnp.linalg.norm(matmul(left[:, 0], W)) / singular_values(W)[0]
    return Certificate(
        dual=dual,
        sigma_max=sigma_max,
        bound=bound,
        gap=(primal - bound) / optimum,
        excess=primal / optimum - 1,
        direction=direction,
        residual=residual,
        tolerance=tolerance,
        verdict=jnp.where(
            unit_least_margin(params, weights)[0] > 0,
            _verdict(direction, residual, sigma_max, tolerance, within),
            NOT_SEPARATED,
        ).astype(jnp.int32),
    )


def kkt_angle(params: Params | DeepParams, weights=None) -> Array:
    r"""Sine of the angle between `Z` and $-\nabla \mathcal L(Z)$, 0 at a KKT direction.

    $$\sqrt{1 - \beta^2}, \qquad
    \beta = \frac{\langle Z, -\nabla \mathcal L \rangle}{|Z| |\nabla \mathcal L|}$$

    It is computed as the relative length of the gradient's tangent part, so that small
    angles keep their digits. It is NaN at the origin.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, as in `kkt`.

    Returns:
      Scalar in [0, 1], float32 for half precision. It is right at any scale at which the
      logits are finite; for `DeepParams` the features of every layer must be finite too.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Ji et al. (ICLR 2022), Theorem 3.2, by which beta tends to 1 along the flow.
    """
    params, weights = check_any_point(params, weights)
    gradient = at_unit_scale(_slope_of_log_loss(params, weights))
    params = at_unit_scale(params)
    radial = inner(gradient, params) / squared_norm(params)
    tangent = jax.tree.map(lambda g, z: g - radial * z, gradient, params)
    return jnp.sqrt(squared_norm(tangent) / squared_norm(gradient))


def _slope_of_log_loss(params: Params | DeepParams, weights: Array | None):
    """`∇log L` times a power of two near L, if L is above 1: 1/L may be too small."""
    log_loss, pull_back = jax.vjp(lambda p: log_cross_entropy(p, weights), params)
    powers = jnp.clip(log_loss / math.log(2), 0, jnp.finfo(log_loss.dtype).maxexp - 8)
    return pull_back(jnp.ldexp(jnp.ones_like(log_loss), powers.astype(jnp.int32)))[0]


def _verdict(direction, residual, sigma_max, tolerance, within) -> Array:
    """Index into VERDICTS of a separated point."""
    saddle = jnp.where(jnp.isnan(direction.W[0, 0]), NO_ROOM, STRICT_SADDLE)
    saddle = jnp.where(within <= _WITHIN, saddle, NOT_KKT)
    code = jnp.where(sigma_max <= 1 + tolerance, GLOBAL_OPTIMUM, saddle)
    return jnp.where(residual <= tolerance, code, NOT_KKT)


def _descent_direction(params: Params, u: Array, v: Array, tolerance: Array) -> Params:
    """`(u aᵀ, v aᵀ) / √2`, with a unit vector a orthogonal to all rows up to tolerance."""
    W, H = at_unit_scale(params)
    chex.assert_shape([u, v], [(len(W),), (H.shape[0] * H.shape[1],)])
    a = orthogonal_to_rows(W, H, tolerance) / math.sqrt(2)
    return Params(W=jnp.outer(u, a), H=jnp.outer(v, a).reshape(H.shape))


def orthogonal_to_rows(W: Array, H: Array, tolerance: Array) -> Array:
    """Return a unit vector (d,) orthogonal to all rows up to tolerance, NaN if none exists.

    Args:
      W: (K, d) array of unit scale.
      H: (K, n, d) array of unit scale.
      tolerance: least singular value of the rows, over the largest, that counts as 0.
    """
    rows = jnp.concatenate([W, H.reshape(-1, H.shape[-1])])
    values, vectors = jnp.linalg.eigh(matmul(rows.T, rows))
    room = values[0] <= tolerance**2 * values[-1]
    return vectors[:, 0] / jnp.sqrt(jnp.where(room, 1.0, -1.0).astype(vectors.dtype))
