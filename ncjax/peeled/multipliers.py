r"""Multipliers of minimum-norm separation (P2) at a point of any number p of factors.

$$\tilde Z = Z / q_{\min}^{1/p}, \qquad \tilde Z = \sum \lambda_{kij} \nabla \tilde m_{kij},
\qquad \lambda_{kij} \ge 0, \qquad \lambda_{kij} (\tilde m_{kij} - 1) = 0$$

Params are checked already; `weights` (K, n) are as in `kernels`.
"""

from functools import reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.numerics import dot, matmul, power_of_two, root_of_scale
from ncjax.peeled import kernels
from ncjax.peeled.kernels import least_margin, squared_norm
from ncjax.peeled.logits import log_odds_of_error, margins_of_params
from ncjax.peeled.nonnegative import nonnegative_least_squares
from ncjax.peeled.points import degree_of, last_factors
from ncjax.peeled.samples import logits_of
from ncjax.types import Array, DeepParams, Params

# Largest default tolerance of a verdict, used at a small norm.
_LOOSEST = 0.1


def check_separated(params: Params | DeepParams, weights: Array | None) -> None:
    """Raise ValueError if a margin is known and not positive."""
    least, root = unit_least_margin(params, weights)
    if not isinstance(least, jax.core.Tracer) and not least > 0:
        q_min = float(margin_from_unit(least, root, degree_of(params)))
        raise ValueError(
            f"every margin must be positive, got q_min = {q_min:.3g}: "
            "multipliers are not defined where a sample is misclassified; follow the flow "
            "until the loss is below log 2"
        )


def residual_tolerance(
    params: Params | DeepParams, weights: Array | None, tol: float | None
) -> Array:
    """Largest residual that counts as zero: `tol`, or by default `q_min^(-1/p)`.

    Residuals decay like this along the flow, because the sum of the rows of W is conserved
    while |Z| grows like `q_min^(1/p)`.
    """
    dtype, degree = params.W.dtype, degree_of(params)
    if tol is not None:
        return jnp.asarray(tol, dtype)
    least, root = unit_least_margin(params, weights)
    positive = least > 0
    q_min = jnp.maximum(margin_from_unit(least, root, degree), 1)
    least = jnp.where(positive, q_min, least)
    return jnp.clip(1 / _root(least, degree), 100 * float(jnp.finfo(dtype).eps), _LOOSEST)


def log_cross_entropy(params: Params | DeepParams, weights: Array | None) -> Array:
    """`log L`, a scalar."""
    return kernels.log_cross_entropy(last_factors(params), weights)


def unit_least_margin(
    params: Params | DeepParams, weights: Array | None
) -> tuple[Array, Array]:
    """`q_min` at factors of unit scale, and the r with `q_min = r^p ·` that number."""
    degree = degree_of(params)
    leaves, structure = jax.tree.flatten(params)
    roots = [root_of_scale(leaf, degree) for leaf in leaves]
    unit = [
        _times(jnp.divide, leaf, root, degree)
        for leaf, root in zip(leaves, roots, strict=True)
    ]
    factors = last_factors(jax.tree.unflatten(structure, unit))
    return least_margin(factors, weights), reduce(jnp.multiply, roots)


def margin_from_unit(least: Array, root: Array, degree: int) -> Array:
    """`q_min` from the two numbers of `unit_least_margin`."""
    return _times(jnp.multiply, least, root, degree)


def _times(operation, x: Array, y: Array, number: int) -> Array:
    """Apply an operation with y to x, `number` times."""
    for _ in range(number):
        x = operation(x, y)
    return x


def normalise(params: Params | DeepParams, weights: Array | None):
    """`Z / q_min^(1/p)`, whose least margin is 1; NaN if q_min is not positive."""
    least, root = unit_least_margin(params, weights)
    degree = degree_of(params)
    least = _root(jnp.where(least > 0, least, -1), degree)
    return jax.tree.map(lambda leaf: leaf / root / least, params)


def _root(x: Array, degree: int) -> Array:
    """Return the root of `x`, NaN below 0."""
    return jnp.sqrt(x) if degree == 2 else x ** (1 / degree)


def finite_margins(params: Params | DeepParams) -> Array:
    """Margins (K, n, K) with 0 where j = k."""
    all_margins, others = margins_of_params(last_factors(params))
    return jnp.where(others, all_margins, 0)


def softmax_multipliers(params: Params | DeepParams, weights: Array | None) -> Array:
    """`ω_ki p_kij / L`, (K, n, K), p the probability of class j at sample (k, i)."""
    factors = last_factors(params)
    margins, others = margins_of_params(factors)
    log_normaliser = jax.nn.softplus(log_odds_of_error(margins, others))[..., None]
    exponents = -margins - log_normaliser - kernels.log_cross_entropy(factors, weights)
    if weights is not None:
        others = others & (weights > 0)[..., None]
        exponents = exponents + jnp.log(jnp.where(weights > 0, weights, 1))[..., None]
    return jnp.where(others, jnp.exp(jnp.where(others, exponents, 0)), 0)


def fitted_scale(scaled: Params | DeepParams, multipliers: Array) -> Array:
    """The s that minimises `|s Σ multipliers ∇m - Z̃|`."""
    combined = combination(multipliers, scaled)
    scale, scale_combined = power_of_two(scaled), power_of_two(combined)
    scaled = jax.tree.map(lambda leaf: leaf / scale, scaled)
    combined = jax.tree.map(lambda leaf: leaf / scale_combined, combined)
    return inner(combined, scaled) / squared_norm(combined) * (scale / scale_combined)


def inner(first, second) -> Array:
    """Inner product of two points."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return reduce(jnp.add, [dot(x.ravel(), y.ravel()) for x, y in pairs])


def dual_matrix(multipliers: Array) -> Array:
    """S (K, K n): column (k, i) has Σ_j λ_kij in row k and -λ_kij in row j."""
    num_classes, per_class, _ = multipliers.shape
    own = jnp.eye(num_classes, dtype=multipliers.dtype)[:, None, :]
    chex.assert_shape(multipliers, (num_classes, per_class, num_classes))
    columns = own * jnp.sum(multipliers, axis=-1, keepdims=True) - multipliers
    return columns.reshape(num_classes * per_class, num_classes).T


def combination(multipliers: Array, params: Params | DeepParams):
    """`Σ λ ∇m`; for two factors `(S H, Sᵀ W)`."""
    dual = dual_matrix(multipliers)
    if isinstance(params, DeepParams):
        slopes = dual.T.reshape(multipliers.shape)
        return jax.vjp(lambda point: logits_of(last_factors(point)), params)[1](slopes)[0]
    W, H = params
    features = H.reshape(-1, H.shape[-1])
    chex.assert_shape(dual, (len(W), len(features)))
    return Params(
        W=matmul(dual, features),
        H=matmul(dual.T, W).reshape(H.shape),
    )


def least_squares_multipliers(scaled: Params | DeepParams, weights: Array | None) -> Array:
    """Non-negative multipliers (K, n, K) with the least KKT residual.

    A program for a CPU calls SciPy, in float64. A program for another platform runs
    `nonnegative_least_squares` in the dtype of the point: float32 adds up to 1e-5 to the
    residual.
    """
    return jax.lax.platform_dependent(scaled, weights, cpu=_by_scipy, default=_by_program)


def _by_program(scaled: Params | DeepParams, weights: Array | None) -> Array:
    """Least-squares multipliers, computed where the program runs."""
    margins = finite_margins(scaled)
    own = jnp.eye(len(margins), dtype=bool)[:, None]
    allowed = jnp.broadcast_to(~own, margins.shape)
    if weights is not None:
        allowed = allowed & (weights > 0)[..., None]
    each = jnp.eye(margins.size, dtype=margins.dtype)
    gradients = jax.vmap(combination, (0, None))(each.reshape(-1, *margins.shape), scaled)
    rows = [leaf.reshape(margins.size, -1).T for leaf in jax.tree.leaves(gradients)]
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(scaled)]
    found = nonnegative_least_squares(
        jnp.concatenate([*rows, jnp.diag(margins.ravel() - 1)]),
        jnp.concatenate([*leaves, jnp.zeros(margins.size, margins.dtype)]),
        allowed.ravel(),
    )
    return found.reshape(margins.shape)


def _by_scipy(scaled: Params | DeepParams, weights: Array | None) -> Array:
    """Least-squares multipliers, computed by the host in float64."""
    num_classes, per_class, _ = scaled.H.shape
    shape = (num_classes, per_class, num_classes)

    def on_host(*arrays):
        *layers, H, weights = arrays
        counted = None if weights is None else np.asarray(weights) > 0
        double = [np.asarray(array, np.float64) for array in (*layers, H)]
        return _nnls(double[:-1], double[-1], counted).astype(H.dtype)

    result = jax.ShapeDtypeStruct(shape, scaled.H.dtype)
    leaves = jax.tree.leaves(scaled)
    return jax.pure_callback(on_host, result, *leaves, weights, vmap_method="sequential")


def _nnls(
    layers: list[np.ndarray], H: np.ndarray, counted: np.ndarray | None
) -> np.ndarray:
    """Active-set non-negative least squares on stationarity and complementarity."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # takes half a second

    num_classes, per_class, _ = H.shape
    pairs = np.broadcast_to(
        ~np.eye(num_classes, dtype=bool)[:, None, :],
        (num_classes, per_class, num_classes),
    )
    k, i, j = np.nonzero(pairs if counted is None else pairs & counted[..., None])
    gradients, margins = _gradients_of_margins(layers, H, k, i, j)
    system = np.concatenate([*gradients, np.diag(margins - 1)])
    if not np.isfinite(system).all():
        return np.full((num_classes, per_class, num_classes), np.nan)
    leaves = [leaf.ravel() for leaf in (*layers, H)]
    target = np.concatenate([*leaves, np.zeros(k.size)])
    multipliers = np.zeros((num_classes, per_class, num_classes))
    multipliers[k, i, j], _ = nnls(system, target, maxiter=100 * k.size)
    return multipliers


def _gradients_of_margins(
    layers: list[np.ndarray], H: np.ndarray, k, i, j
) -> tuple[list[np.ndarray], np.ndarray]:
    """Gradients of m_kij in every factor, (entries, pairs) each, H last; and m_kij.

    With the classifier V above a layer and the features f below it, the gradient in the
    layer is `(V_k - V_j)ᵀ f_ki`.
    """
    below = [H]
    for W in layers[:-1]:
        below.append(below[-1] @ W.T)
    above = [np.eye(len(H))]
    for W in reversed(layers):
        above.insert(0, above[0] @ W)
    gradients = [
        np.einsum("mr,mc->rcm", V[k] - V[j], f[k, i]).reshape(-1, k.size)
        for V, f in zip(above[1:], below, strict=True)
    ]
    difference = above[0][k] - above[0][j]
    of_H = np.zeros((*H.shape, k.size))
    of_H[k, i, :, np.arange(k.size)] = difference
    margins = np.sum(difference * H[k, i], axis=1)
    return [*gradients, of_H.reshape(-1, k.size)], margins
