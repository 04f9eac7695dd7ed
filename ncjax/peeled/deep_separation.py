r"""Certificate of a point of several linear layers: proved bounds and known values.

$$\min \tfrac12 |Z|^2 = \tfrac12 \sum_l |W_l|_F^2 + \tfrac12 |H|_F^2 \quad \text{s.t.} \quad
\text{all margins} \ge 1$$

With p factors it is $\min \tfrac p2 \sum_i \sigma_i(M)^{2/p}$ over the logits M, whose
margins are at least 1. For p >= 3 this is not convex, and the nuclear norm's dual, with its
test of $\sigma_{\max}$, says nothing.
"""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_choice
from ncjax.peeled import separation
from ncjax.peeled.codes import fitting_matrices
from ncjax.peeled.factors import norm_of_matrix
from ncjax.peeled.kernels import separation_value, squared_norm
from ncjax.peeled.margin_bound import collapse_value, least_width
from ncjax.peeled.multipliers import (
    check_separated,
    normalise,
    residual_tolerance,
    unit_least_margin,
)
from ncjax.peeled.points import check_deep_point, last_factors
from ncjax.peeled.samples import logits_of
from ncjax.peeled.separation import MULTIPLIERS
from ncjax.singular import singular_values
from ncjax.types import Array, DeepParams, Params

# Values of `DeepCertificate.verdict`, and their meanings.
GLOBAL_OPTIMUM = 0
UNDECIDED = 1
NOT_KKT = 2
NOT_SEPARATED = 3
NOT_OPTIMAL = 4
DEEP_VERDICTS = (
    "globally optimal direction",
    "KKT direction whose optimality no test decides",
    "not a KKT point",
    "not separated: a sample is misclassified",
    "KKT direction that is not globally optimal",
)

# Most classes whose codes are all compared, in about a second.
_MOST_CLASSES = 20


class DeepCertificate(NamedTuple):
    r"""Bounds and known values for the direction of a point of p factors."""

    value: Array  # ()  |Z̃|²/2
    bound: Array  # ()  (p/2) v(n)^(2/p), at most the minimum of |Z̃|²/2
    gap: Array  # ()  value / bound - 1
    excess: Array  # ()  value over the value of collapse, minus 1; negative below it
    schatten: Array  # ()  (p/2) Σ σ_i^(2/p) of the logits, the least value with them
    imbalance: Array  # ()  value / schatten - 1, zero for balanced factors
    residual: Array  # ()  the larger of stationarity and complementarity
    tolerance: Array  # ()  upper bound of a residual that counts as zero
    transverse: Array  # ()  Hessian eigenvalue of directions orthogonal to all rows
    verdict: Array  # ()  index into DEEP_VERDICTS (int32)


def deep_certificate(
    params: DeepParams,
    weights=None,
    *,
    multipliers: str = "softmax",
    tol: float | None = None,
) -> DeepCertificate:
    r"""Measure how far a direction of p = L + 1 factors is from known bounds.

    Let $\tilde Z = Z / q_{\min}^{1/p}$, with logits $\tilde M$ (K, N) of singular values
    $\sigma_i$. Then

    $$\tfrac12 |\tilde Z|^2 \;\ge\; \tfrac p2 \sum_i \sigma_i^{2/p} \;\ge\;
    \tfrac p2 \Bigl(\sum_i \sigma_i\Bigr)^{2/p} \;\ge\; \tfrac p2\, v(n)^{2/p}.$$

    The first is an equality for balanced factors, $W_{l+1}^\top W_{l+1} = W_l W_l^\top$ and
    $W_1^\top W_1 = \sum h h^\top$. The last number, `bound`, is the only lower bound of the
    minimum that is proved. For p >= 3 it is attained for K = 2 alone, and for K >= 3 no
    test decides whether a KKT direction is optimal: **the test of sigma_max does not
    apply**. A KKT direction is called not optimal if a code of `softmax_codes` has a
    smaller norm (above 20 classes, or with weights: if collapse has), and undecided
    otherwise.

    For p >= 3 collapse and other softmax codes can be stable side by side. A direction
    orthogonal to all rows and columns of all factors changes the logits in order p of the
    step. The Riemannian Hessian of $\log \mathcal L$ on the sphere has there the eigenvalue
    `transverse`, at a large norm

    $$\frac p{2V} q_{\min}^{1-2/p} > 0, \qquad V = \tfrac12 |\tilde Z|^2.$$

    For two factors the eigenvalues are $(1 \pm \sigma_i(S)) / V$ instead, which may be
    negative.

    With one layer, p = 2, `ncjax.certificate` of the two factors gives the verdict.
    Where sigma_max exceeds 1 and the descent needs a larger width, it is undecided.

    Args:
      params: `DeepParams` with every sample classified correctly, at a scale for which
        `kkt` is right.
      weights: (K, n) or (K,) weights of the samples or classes in the loss, not negative.
        Samples of weight 0 are left out. None is 1 everywhere.
      multipliers: as in `kkt`. Softmax weights are right at a large norm on the flow. At
        a point that no flow made, such as a result of `solve_separation`, use "nnls":
        softmax weights of equal margins are equal, at any norm.
      tol: largest residual that counts as zero; a value above a known smaller one by this
        share counts as larger. None takes $q_{\min}^{-1/p}$, the rate at which the
        residuals of the flow decay, clipped to at most 0.1 and at least 100 roundings.

    Returns:
      `DeepCertificate`, float32 for half precision. `DEEP_VERDICTS[int(verdict)]` is the
      verdict in words. Singular values below rounding count as 0.

    Raises:
      ValueError: as `kkt`, or tol is negative.

    Source: ncjax; the bound by Schatten norms follows Haeffele, Vidal (2015), and Sukenik
    et al. (2024) and Garrod, Keating (2025) found that collapse need not be optimal.

    >>> import jax, ncjax
    >>> codes = ncjax.softmax_codes(num_classes=6, depth=2)
    >>> far = jax.tree.map(lambda leaf: 30 * leaf, codes["simplex"].params)  # collapse
    >>> found = ncjax.certificate(far)
    >>> ncjax.DEEP_VERDICTS[int(found.verdict)]
    'KKT direction that is not globally optimal'
    >>> round(float(found.value), 3), round(codes["pairs"].value, 3)
    (7.5, 7.143)
    """
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    check_choice("multipliers", multipliers, MULTIPLIERS)
    params, weights = check_deep_point(params, weights, finite=True)
    check_separated(params, weights)
    return _certificate(params, weights, multipliers, tol)


@partial(jax.jit, static_argnums=2)
def _certificate(
    params: DeepParams, weights: Array | None, multipliers: str, tol: float | None
) -> DeepCertificate:
    degree = params.degree
    conditions = separation.kkt(params, weights, multipliers=multipliers)
    scaled = normalise(params, weights)
    value = squared_norm(scaled) / 2
    bound = degree / 2 * separation_value(params, weights) ** (2 / degree)
    schatten = _schatten_value(scaled)
    residual = jnp.maximum(conditions.stationarity, jnp.abs(conditions.complementarity))
    tolerance = residual_tolerance(params, weights, tol)
    if degree == 2:
        verdict = _verdict_of_two_factors(params, weights, multipliers, tol)
    else:
        verdict = _verdict(params, weights, schatten, residual, tolerance)
    least, root = unit_least_margin(params, weights)
    return DeepCertificate(
        value=value,
        bound=jnp.asarray(bound, value.dtype),
        gap=value / bound - 1,
        excess=value / collapse_value(params, weights) - 1,
        schatten=schatten,
        imbalance=value / schatten - 1,
        residual=residual,
        tolerance=tolerance,
        transverse=_transverse(least, root, degree) / value,
        verdict=jnp.where(least > 0, verdict, NOT_SEPARATED).astype(jnp.int32),
    )


def _transverse(least: Array, root: Array, degree: int) -> Array:
    """`(p/2) q^(1-2/p)` for `q = root^p least`, without overflow."""
    positive = jnp.where(least > 0, least, 1)
    return degree / 2 * positive ** (1 - 2 / degree) * root ** (degree - 2)


def _schatten_value(scaled: DeepParams) -> Array:
    """`(p/2) Σ σ_i^(2/p)` of the logits, a matrix with a column for each sample."""
    logits = logits_of(last_factors(scaled))
    matrix = logits.reshape(-1, logits.shape[-1])
    sigma = singular_values(matrix)[: least_width(scaled)]
    rounding = max(matrix.shape) * float(jnp.finfo(sigma.dtype).eps) * sigma[0]
    # A small power of a rounding is not small.
    powers = jnp.where(sigma > rounding, sigma, 0) ** (2 / scaled.degree)
    return scaled.degree / 2 * jnp.sum(powers)


def _verdict(params, weights, schatten, residual, tolerance) -> Array:
    """Index into DEEP_VERDICTS of a separated point of three factors or more."""
    if len(params.layers[-1]) == 2:
        # Every KKT direction has the logits u gᵀ of one rank, and all margins 1.
        code = jnp.asarray(GLOBAL_OPTIMUM)
    else:
        known = _least_known_value(params, weights)
        code = jnp.where(schatten > (1 + tolerance) * known, NOT_OPTIMAL, UNDECIDED)
    return jnp.where(residual <= tolerance, code, NOT_KKT)


def _least_known_value(params: DeepParams, weights: Array | None) -> float | Array:
    """Return the least value of collapse and of the codes whose rank the widths allow."""
    num_classes, per_class, _ = params.H.shape
    width, degree = least_width(params), params.degree
    if weights is not None or num_classes > _MOST_CLASSES:
        fits = width >= num_classes - 1
        return collapse_value(params, weights) if fits else math.inf
    return _least_of_codes(num_classes, degree, width) * per_class ** (1 / degree)


@lru_cache
def _least_of_codes(num_classes: int, degree: int, width: int) -> float:
    """Return the least value of a code at one sample a class; infinity if none fits."""
    fitting = fitting_matrices(num_classes, width)
    return min((norm_of_matrix(M, degree) for M in fitting), default=math.inf)


def _verdict_of_two_factors(params, weights, multipliers, tol) -> Array:
    """Index into DEEP_VERDICTS from the test of sigma_max."""
    factors = Params(params.W, params.H)
    proof = separation.certificate(factors, weights, multipliers=multipliers, tol=tol)
    of_verdict = {
        separation.GLOBAL_OPTIMUM: GLOBAL_OPTIMUM,
        separation.STRICT_SADDLE: NOT_OPTIMAL,
        separation.NOT_KKT: NOT_KKT,
        separation.NOT_SEPARATED: NOT_SEPARATED,
        separation.NO_ROOM: UNDECIDED,
    }
    table = jnp.asarray([of_verdict[code] for code in sorted(of_verdict)])
    return table[proof.verdict]
