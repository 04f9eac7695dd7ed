"""Certificates of any point: lower bound, gap, verdict, direction of descent."""

from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from ncjax.checks import check_nonnegative
from ncjax.numerics import at_unit_scale, einsum, matmul, on_device, power_of_two
from ncjax.objectives.bounds import largest_nuclear_norm, lower_bound, num_samples
from ncjax.objectives.focal_bound import focal_bound
from ncjax.objectives.free_bias import with_best_bias
from ncjax.objectives.objective import Objective, require_objective, unit_rows
from ncjax.peeled import samples, separation
from ncjax.peeled.deep_separation import DeepCertificate, deep_certificate
from ncjax.peeled.weights import weighted
from ncjax.types import Array, BiasedParams, DeepParams, Params

# Values of `PointCertificate.verdict`, and their meanings.
GLOBAL_OPTIMUM = 0
STRICT_SADDLE = 1
NOT_CRITICAL = 2
NO_ROOM = 3
NOT_PROVED = 4
POINT_VERDICTS = (
    "globally optimal point",
    "strict saddle point",
    "not a critical point",
    "critical point that is not optimal, its descent direction needs a larger dim",
    "critical point, neither proved optimal nor a strict saddle",
)

# The default tolerance is this power of the rounding: 6e-6 in float64, 5e-3 in float32.
_POWER = 1 / 3
# Bound on |Wᵀu| / |W|_2 at a saddle, where the exact value is 0; u is the top left singular
# vector of G.
_WITHIN = 0.5


class PointCertificate(NamedTuple):
    """How far a point is from the minimum; at a saddle, a direction of descent."""

    value: Array  # ()  F at the point; for a ball the loss
    bound: Array  # ()  lower bound of the minimum of F
    gap: Array  # ()  value - bound
    theta: Array  # ()  share of the slopes, in [0, 1], that gives the bound
    sigma_max: Array  # ()  largest singular value of G; at most mu at an optimum
    mu: Array  # ()  √(λ_W λ_H); for a ball or a temperature -<G, M> / tau
    residual: Array  # ()  relative gradient
    direction: Params | BiasedParams  # unit direction of the top singular vectors
    tolerance: Array  # ()  upper bound for residual and for sigma_max / mu - 1
    verdict: Array  # ()  index into POINT_VERDICTS (int32)


@overload
def certificate(
    params: Params,
    objective: None = None,
    *,
    weights=None,
    multipliers: str = "softmax",
    tol: float | None = None,
) -> separation.Certificate: ...


@overload
def certificate(
    params: DeepParams,
    objective: None = None,
    *,
    weights=None,
    multipliers: str = "softmax",
    tol: float | None = None,
) -> DeepCertificate: ...


@overload
def certificate(
    params: Params | BiasedParams,
    objective: Objective,
    *,
    weights=None,
    multipliers: str = "softmax",
    tol: float | None = None,
) -> PointCertificate: ...


def certificate(
    params: Params | BiasedParams | DeepParams,
    objective: Objective | None = None,
    *,
    weights=None,
    multipliers: str = "softmax",
    tol: float | None = None,
):
    r"""Bound the minimum of an objective from any point, and judge the point.

    With an objective, G (K, N) is the gradient of the loss in the logits, with the
    largest singular value $\sigma_{\max}$. A lower bound of the minimum follows from G
    at any point, critical or not; see `ncjax.objectives.bounds`. A critical point of
    weight decay or of a ball is a global minimum if and only if $\sigma_{\max} \le
    \mu$. Otherwise let u, v be the top singular vectors of -G, and a a unit vector
    orthogonal to all rows of W and H. For $\lambda_W = \lambda_H$ the value falls along
    $(u a^\top, v a^\top) / \sqrt 2$ with curvature $\mu - \sigma_{\max}$, the least
    eigenvalue of the Hessian. In general it falls along $(\cos \phi\, u a^\top, \sin
    \phi\, v a^\top)$, where $(\cos \phi, \sin \phi)$ is the least eigenvector of

    $$\begin{pmatrix} \lambda_W & -\sigma_{\max} \\ -\sigma_{\max} & \lambda_H
    \end{pmatrix}.$$

    For a ball $\lambda_W = -\langle G, M \rangle / |W|^2$ and $\lambda_H = -\langle G, M
    \rangle / |H|^2$ with $M = W H^\top$.

    The residual of weight decay is $\sqrt{(|\nabla_W F|^2 / \lambda_W + |\nabla_H F|^2 /
    \lambda_H) / 2F}$; its square estimates (F - min F) / F. For a ball (a, b) it is
    $\sqrt{(a |g_W|^2 + b |g_H|^2) / 2} / (\tau \sigma_{\max})$ with the tangential
    gradients g, and includes the distance to the boundary; for a temperature (a, b) are
    (K, N) and the gradients are taken in the unit vectors. A bias adds $|\nabla_b F| /
    (\sqrt N \sigma_{\max} + \lambda_b |b|)$.

    The slopes of the squared error and of label smoothing vanish at an optimum inside a
    ball. There $\sigma_{\max}$ counts as zero up to tol times $|\omega|$, or $\alpha
    |\omega|$ with smoothing, and the residual has this scale in place of a smaller
    $\sigma_{\max}$.

    With the focal loss, a temperature or a fixed classifier, $\sigma_{\max} \le \mu$
    proves nothing. There a critical point is called optimal if the gap is at most tol times
    the value. The bound of the focal loss is the value of collapse, for balanced classes.

    Without an objective this is `ncjax.separation.certificate`, for the direction of the
    unregularised model. For `DeepParams` it is
    `ncjax.peeled.deep_separation.deep_certificate`: with three or more factors the test of
    $\sigma_{\max}$ does not apply, and no test decides whether a KKT direction is optimal.

    Works under `jax.jit` and `jax.vmap`.

    Args:
      params: `W` (K, d) and `H` (K, n, d), and `b` (K,) if the objective has a bias; or,
        without an objective, `DeepParams`.
      objective: `Objective` with weight decay, a ball or a temperature; None certifies the
        direction of the unregularised model.
      weights: (K, n) or (K,) weights, see `sample_weights`; 1 if None.
      multipliers: without an objective, see `ncjax.separation.certificate`.
      tol: largest residual, and largest $\sigma_{\max} / \mu - 1$, that count as zero. None
        takes the cube root of the rounding, 6e-6 in float64 and 5e-3 in float32.

    Returns:
      `PointCertificate`, float32 for half precision; `POINT_VERDICTS[int(verdict)]` is the
      verdict in words. With a free bias, G, the bound and $\sigma_{\max}$ are taken at the
      best bias for this W and H. The direction is NaN if the rows of W and H span the whole
      space; `jax_debug_nans` reports it. At a saddle of cross entropy without bias they do
      not if d >= K - 1. Without an objective, `Certificate`, for `DeepParams`
      `DeepCertificate`.

    Raises:
      ValueError: shapes or dtypes do not fit, the objective has no regularisation, a decay
        of 0, a loss without a bound, or weights with the focal loss, tol is negative,
        `DeepParams` come with an objective, or (outside jit) params are not finite.

    Source: Zhu et al. (NeurIPS 2021), and Haeffele, Vidal (2015) for the dual; the bounds
    away from critical points are ncjax's.

    >>> import ncjax, jax.numpy as jnp
    >>> objective = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))
    >>> origin = ncjax.Params(W=jnp.zeros((3, 4)), H=jnp.zeros((3, 2, 4)))
    >>> found = ncjax.certificate(origin, objective)
    >>> ncjax.POINT_VERDICTS[int(found.verdict)]
    'strict saddle point'
    """
    if objective is None:
        judge: Any = separation.certificate
        if isinstance(params, DeepParams):
            judge = deep_certificate
        return judge(params, weights, multipliers=multipliers, tol=tol)
    require_objective(objective)
    if isinstance(params, DeepParams):
        raise ValueError(
            "an objective is certified for ncjax.Params alone, got ncjax.DeepParams: no "
            "lower bound is known for several layers, call ncjax.certificate(params)"
        )
    if multipliers != "softmax":
        raise ValueError(
            f"multipliers are for a certificate without objective, got {multipliers!r}"
        )
    if tol is not None:
        check_nonnegative("tol", tol)
    _check_bounded(objective)
    if objective.loss == "focal" and weights is not None:
        raise ValueError(
            "the focal loss has a bound for balanced classes alone: pass H with n samples "
            "in every class and weights=None"
        )
    params, weights = objective.check(params, weights, finite=True)
    dtype = params.W.dtype
    tol = float(jnp.finfo(dtype).eps) ** _POWER if tol is None else tol
    free_bias = _is_zero(objective.bias)
    objective = jax.tree.map(lambda number: on_device(number, dtype), objective)
    return _certificate(objective, params, weights, on_device(tol, dtype), free_bias)


def _check_bounded(objective: Objective) -> None:
    """Raise ValueError unless a lower bound is known."""
    if callable(objective.loss):
        raise ValueError(
            "a lower bound is known for cross_entropy, focal and squared_error, got a "
            f"function, {objective.loss!r}"
        )
    if not objective.regularised:
        raise ValueError(
            f"the objective needs weight_decay, ball or temperature, got {objective}: "
            "ncjax.certificate(params) without objective certifies the loss alone"
        )
    decays = objective.weight_decay or ()
    if any(map(_is_zero, decays[1:] if objective.fixed_classifier else decays)):
        raise ValueError(
            f"weight_decay must be positive for a bound, got {decays}: with a decay of 0 "
            "no minimum is attained"
        )


def _is_zero(number) -> bool:
    """Whether a number is known and 0."""
    known = number is not None and not isinstance(number, jax.core.Tracer)
    return known and float(number) == 0


@partial(jax.jit, static_argnames="free_bias")
def _certificate(objective, params, weights, tol, free_bias: bool) -> PointCertificate:
    focal = objective.loss == "focal"
    if objective.temperature is not None:
        params = params._replace(W=unit_rows(params.W), H=unit_rows(params.H))
    value = objective(params, weights)
    gradient = jax.grad(lambda params: objective(params, weights))(params)
    best = params
    if free_bias and not focal:
        best = with_best_bias(objective, params, weights)
    slopes = objective.slopes(best, weights)
    u, sigma_max, v = _top_singular(-slopes)
    if focal:
        bound, theta = focal_bound(objective, params)
    else:
        bound, theta = lower_bound(objective, best, weights, slopes, sigma_max, free_bias)
    decays, mu = _multipliers(objective, params, weights, slopes)
    direction = _direction(params, u, v, decays, sigma_max, tol)
    scale = _scale_of_slopes(objective, params, weights)
    residual = _residual(
        objective, params, weights, gradient, value, jnp.maximum(sigma_max, scale), mu
    )
    return PointCertificate(
        value=value,
        bound=bound,
        gap=value - bound,
        theta=theta,
        sigma_max=sigma_max,
        mu=mu,
        residual=residual,
        direction=direction,
        tolerance=tol,
        verdict=_verdict(
            objective,
            proved_by_gap=value - bound <= tol * jnp.maximum(value, tol * scale**2),
            critical=residual <= tol,
            exceeds=sigma_max > mu + tol * jnp.maximum(mu, scale),
            across=_across(params.W, u),
            room=~jnp.isnan(direction.W[0, 0]),
        ),
    )


def _verdict(objective, proved_by_gap, critical, exceeds, across, room) -> Array:
    """Index into POINT_VERDICTS (int32)."""
    by_gap = jnp.where(proved_by_gap, GLOBAL_OPTIMUM, NOT_PROVED)
    if objective.fixed_classifier or objective.temperature is not None:
        code = by_gap
    else:
        saddle = jnp.where(room, STRICT_SADDLE, NO_ROOM)
        saddle = jnp.where(across, saddle, NOT_CRITICAL)
        within = by_gap if objective.loss == "focal" else GLOBAL_OPTIMUM
        code = jnp.where(exceeds, saddle, within)
    return jnp.where(critical, code, NOT_CRITICAL).astype(jnp.int32)


def _across(W: Array, u: Array) -> Array:
    """Whether u is orthogonal to the columns of W, as at a critical point with excess."""
    W = at_unit_scale(W)
    return jnp.linalg.norm(matmul(u, W)) <= _WITHIN * jnp.linalg.norm(W, 2)


def _multipliers(objective, params, weights, slopes) -> tuple[tuple[Array, Array], Array]:
    """Return the decays of W and H, which a ball or a temperature implies, and mu."""
    if objective.weight_decay is not None:
        return objective.weight_decay, objective.mu
    logits = samples.logits_of(Params(params.W, params.H))
    if objective.temperature is not None:
        logits = objective.temperature * logits
    pull = -jnp.sum(slopes * logits)
    of_W, of_H = (
        pull / jnp.where(size > 0, size, 1)
        for size in (jnp.sum(params.W**2), jnp.sum(params.H**2))
    )
    return (of_W, of_H), pull / largest_nuclear_norm(objective, params, weights)


def _scale_of_slopes(objective, params, weights) -> Array:
    """Return the size of the terms that cancel in the slopes; 0 if they never vanish."""
    share = 1.0 if objective.loss == "squared_error" else objective.smoothing
    ones = jnp.ones(params.H.shape[:2], params.H.dtype)
    size = jnp.sqrt(jnp.sum(weighted(ones, weights) ** 2))
    return jnp.zeros_like(size) if share is None else share * size


def _residual(objective, params, weights, gradient, value, size, mu) -> Array:
    """Return the relative gradient for slopes of a size, see `certificate`."""
    moving = ("H",) if objective.fixed_classifier else ("W", "H")
    squares = {name: jnp.sum(getattr(gradient, name) ** 2) for name in moving}
    if objective.weight_decay is not None:
        decays = dict(zip("WH", objective.weight_decay, strict=True))
        total = sum(squares[name] / decays[name] for name in moving) / (2 * value)
    else:
        total = _residual_on_boundary(
            objective, params, weights, gradient, moving, size, mu
        )
    if objective.bias is not None:
        scale = jnp.sqrt(num_samples(params, weights)) * size
        scale += objective.bias * jnp.sqrt(jnp.sum(params.b**2))
        total += jnp.sum(gradient.b**2) / jnp.where(scale > 0, scale, 1) ** 2
    return jnp.sqrt(total)


def _residual_on_boundary(objective, params, weights, gradient, moving, size, mu) -> Array:
    """Return the square of the residual of a ball or a temperature, without bias."""
    tau = largest_nuclear_norm(objective, params, weights)
    sizes = {name: jnp.sum(getattr(params, name) ** 2) for name in moving}
    scale = tau * size
    if objective.ball is None:  # a row of zeros has no unit vector
        rows = jnp.full_like(scale, len(params.W))
        limits, inside = (rows, num_samples(params, weights)), scale
    else:
        limits, inside = objective.ball, mu * tau
    bounds = dict(zip("WH", limits, strict=True))
    total = jnp.zeros_like(size)
    for name in moving:
        slope, leaf = getattr(gradient, name), getattr(params, name)
        along = jnp.sum(slope * leaf) / jnp.where(sizes[name] > 0, sizes[name], 1)
        tangent = jnp.sum((slope - along * leaf) ** 2)
        excess = sizes[name] / bounds[name] - 1
        distance = jnp.where(excess > 0, scale, inside) * excess
        total += bounds[name] * tangent / 2 + distance**2
    return total / jnp.where(scale > 0, scale, 1) ** 2


def _top_singular(matrix: Array) -> tuple[Array, Array, Array]:
    """Return the top singular vectors u (K,), v (K, n) and value of (K, n, K), last first.

    The Gram matrix (K, K) is much smaller than (K, N), and its largest eigenvalue keeps its
    digits.
    """
    scale = power_of_two(matrix)
    unit = matrix / scale
    squares, vectors = jnp.linalg.eigh(einsum("kij,kil->jl", unit, unit))
    sigma, u = jnp.sqrt(jnp.maximum(squares[-1], 0)), vectors[:, -1]
    v = einsum("kij,j->ki", unit, u)
    length = jnp.sqrt(jnp.sum(v**2))
    return u, scale * sigma, v / jnp.where(length > 0, length, 1)


def _direction(params, u: Array, v: Array, decays, sigma_max: Array, tol: Array):
    """Return `(cos φ u aᵀ, sin φ v aᵀ)`, with a orthogonal to all rows up to tol."""
    W, H = at_unit_scale(params.W), at_unit_scale(params.H)
    a = separation.orthogonal_to_rows(W, H, tol)
    angle = jnp.arctan2(sigma_max, (decays[1] - decays[0]) / 2) / 2
    found = {
        "W": jnp.cos(angle) * jnp.outer(u, a),
        "H": jnp.sin(angle) * einsum("ki,d->kid", v, a),
    }
    if isinstance(params, BiasedParams):
        found["b"] = jnp.zeros_like(params.b)
    return params._replace(**found)
