r"""The largest dataset margin at a norm: the margin ratio, and the value of collapse.

With the attainable value $V = \min |Z|^2 / 2$ subject to margins of at least 1, a point of
p factors has $q_{\min} \le (|Z|^2 / 2V)^{p/2}$.
"""

import math

import jax.numpy as jnp

from ncjax.checks import check_positive
from ncjax.numerics import at_unit_scale, on_device
from ncjax.peeled import kernels
from ncjax.peeled.geometry import helmert
from ncjax.peeled.multipliers import unit_least_margin
from ncjax.peeled.points import check_any_point
from ncjax.singular import singular_values
from ncjax.types import Array, DeepParams, Params

# Most classes for which the attainable norm is known where 2 < d < K/2.
_SEARCHED = 12
# Least values at one sample a class by (K, d), from `solve_separation` with 68 starts or
# more. At (11, 5), two opposite simplices and an apex, a start in forty ends there.
VALUES_FOUND = {
    (7, 3): 8.840448186187988,
    (8, 3): 10.828427124746190,
    (9, 3): 13.486677996358168,
    (9, 4): 10.687444756394445,
    (10, 3): 16.695788936229853,
    (10, 4): 12.0,
    (11, 3): 19.791434699842753,
    (11, 4): 14.276992414302027,
    (11, 5): 12.604788188931646,
    (12, 3): 21.708203932499369,
    (12, 4): 15.981455682671218,
    (12, 5): 14.0,
}


def margin_ratio(params: Params | DeepParams, weights=None, *, value=None) -> Array:
    r"""Dataset margin over the attainable one at this norm, to the power 2/p.

    $$\frac{2 V q_{\min}^{2/p}}{|Z|^2}, \qquad
    q_{\min} = \min_{k,i} \min_{j \ne k} (w_k - w_j)^\top h_{k,i}$$

    p is the number of factors, 2 for `Params`, and V is the attainable value: the least
    $|Z|^2 / 2$ at margins of 1. The ratio does not depend on the norm of `Z`, and is NaN at
    the origin. No scale of `Z` overflows. It has the sign of $q_{\min}$.

    **Two factors.** The default of V for $d \ge K - 1$ is $v(n)$, `separation_value` of the
    class sizes, $(K-1) \sqrt n$ for equal ones. The ratio is 1 if and only if `Z` is an
    optimal direction, with `|W|_F = |H|_F`: neural collapse for classes of equal size. For
    $d < K - 1$ V is the value of the best points known, none of them proved optimal. These
    are the regular polygon for d = 2, the pairs with $2d - K$ apexes of `softmax_codes` for
    $d \ge K/2$, with $V = \sqrt n\, (K - 1 + \sqrt{2 (K - d) / K})$, and otherwise the
    least of many searches by `solve_separation`, tabulated up to K = 12.

    **Several layers.** The default of V is the value of collapse, $\tfrac p2 \sum_i
    \sigma_i^{2/p}$ with the singular values of $P \operatorname{diag}(\sqrt{n_k})$, which
    is $\tfrac p2 (K-1) n^{1/p}$ for equal sizes. The ratio is 1 at a balanced collapse. For
    p >= 3 collapse need not have the least norm, and the ratio exceeds 1 at codes of a
    smaller norm, such as three antipodal pairs for K = 6 and p = 3: 1.05.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: (K, n) or (K,) weights of the samples or classes, not negative. Samples of
        weight 0 are left out; other weights change nothing. None is 1 everywhere.
      value: V, if you know it, such as `solve_separation(counts, dim).value`.

    Returns:
      Scalar, float32 for half precision.

    Raises:
      ValueError: shapes, dtypes or weights do not fit, or value is not positive. Or it is
        None, the least width is below K - 1, and there are weights, or several layers, or
        more than 12 classes with 2 < d < K/2, or d = 1, where $q_{\min}$ is never positive.

    Source: Ji et al. (ICLR 2022), Theorem 3.1; ncjax for classes of unequal size, for
    several layers and for small d.

    >>> import ncjax
    >>> square = ncjax.solve_separation(counts=(1, 1, 1, 1), dim=2)
    >>> round(float(ncjax.margin_ratio(square.params)), 6)
    1.0
    """
    params, weights = check_any_point(params, weights)
    params = at_unit_scale(params)
    size = kernels.squared_norm(params)
    if value is None:
        value = _default_value(params, weights)
    else:
        check_positive("value", value, params.H.dtype)
        value = on_device(value, params.H.dtype)
    bound = size / (2 * value)
    if isinstance(params, DeepParams):
        return _margin_as_square(params, weights) / bound
    return kernels.least_margin(params, weights) / bound


def _margin_as_square(params: DeepParams, weights: Array | None) -> Array:
    """`q_min^(2/p)` with the sign of `q_min`."""
    least, root = unit_least_margin(params, weights)
    length = jnp.abs(least) ** (1 / params.degree) * root
    return jnp.sign(least) * length**2


def _default_value(params: Params | DeepParams, weights: Array | None) -> float | Array:
    """Return V for `margin_ratio`; raise ValueError if it is not known."""
    num_classes, per_class, _ = params.H.shape
    width = least_width(params)
    if width >= num_classes - 1:
        if isinstance(params, DeepParams):
            return collapse_value(params, weights)
        return kernels.separation_value(params, weights)
    name = "the least width" if isinstance(params, DeepParams) else "dim"
    small = f"{name} is {width}, below K - 1 = {num_classes - 1}"
    if width == 1:
        raise ValueError(
            f"{small}: no point separates three classes in one dimension, take 2 or more"
        )
    if isinstance(params, DeepParams):
        reason = "collapse does not fit"
    elif weights is not None:
        reason = "with weights no attainable norm is known"
    else:
        value = attainable_value(num_classes, per_class, width)
        if value is not None:
            return value
        reason = f"no attainable norm is known for K above {_SEARCHED} and 2 < d < K/2"
    raise ValueError(
        f"{small}: {reason}; pass value= with the least |Z|²/2 at margins of 1, such as "
        "ncjax.solve_separation(...).value"
    )


def attainable_value(num_classes: int, per_class: int, dim: int) -> float | None:
    """Return V of two factors and classes of equal size; None if it is not known."""
    root = math.sqrt(per_class)
    if dim >= num_classes - 1:
        return (num_classes - 1) * root
    if dim > 2 and 2 * dim >= num_classes:  # pairs and 2 d - K apexes
        return root * (num_classes - 1 + math.sqrt(2 * (1 - dim / num_classes)))
    if dim == 2:  # regular polygon
        return root * num_classes / (1 - math.cos(2 * math.pi / num_classes))
    found = VALUES_FOUND.get((num_classes, dim))
    return None if found is None else root * found


def value_or_bound(params: Params) -> float:
    """Return V for classes of equal size; `v(n)`, its lower bound, where V is not known.

    With it `margin_ratio` is defined for all shapes. No point above 1 is known.
    """
    num_classes, per_class, dim = params.H.shape
    value = attainable_value(num_classes, per_class, dim)
    return (num_classes - 1) * math.sqrt(per_class) if value is None else value


def least_width(params: Params | DeepParams) -> int:
    """Return the least width, which bounds the rank of the logits."""
    layers = params.layers if isinstance(params, DeepParams) else (params.W,)
    return min(W.shape[1] for W in layers)


def collapse_value(params: DeepParams, weights: Array | None) -> float | Array:
    r"""$\tfrac p2 \sum \sigma_i^{2/p}$, $|Z|^2 / 2$ at a balanced collapse of margins 1.

    The $\sigma_i$ are the K - 1 singular values of $P \operatorname{diag}(\sqrt{n_k})$.
    """
    num_classes, per_class, _ = params.H.shape
    half, power = params.degree / 2, 2 / params.degree
    if weights is None:
        return half * (num_classes - 1) * per_class ** (power / 2)
    counts = jnp.sum((weights > 0).astype(weights.dtype), axis=1)
    # In a basis of the vectors that sum to zero, without the singular value 0, because a
    # small power of its rounding is not small.
    basis = on_device(helmert(num_classes), weights.dtype)
    sigma = singular_values(basis * jnp.sqrt(counts)[None])
    return half * jnp.sum(sigma**power)
