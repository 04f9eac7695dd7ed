"""Points of the model and their geometry: starts, simplex ETF, margins, block saddles."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import (
    check_counts,
    check_integer,
    check_key,
    check_scale,
    check_sizes,
    float_dtype,
)
from ncjax.numerics import matmul, wide_dtype, widen
from ncjax.peeled import kernels
from ncjax.peeled.logits import margins_of_params
from ncjax.peeled.points import check_any_params, check_factors
from ncjax.peeled.weights import sample_weights, without_left_out
from ncjax.types import Array, DeepParams, Params


def init_params(
    key: Array,
    num_classes: int,
    per_class: int | Sequence[int],
    dim: int,
    scale: float = 0.1,
    dtype=None,
) -> Params:
    """Draw every entry of `W` and `H` from `N(0, scale²)`, independently.

    Args:
      key: PRNG key; `jax.vmap` over an array of keys gives one start per seed.
      num_classes: `K`, at least 2.
      per_class: `n`, samples of each class, at least 1; or the counts (K,) of classes that
        differ in size. `H` then has n = max n_k rows for each class, zeros beyond n_k, and
        `weights=ncjax.sample_weights(counts)` leaves these rows out of any function.
      dim: `d`, feature dimension, at least 1.
      scale: standard deviation of an entry, not negative.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `Params` with `W` (K, d) and `H` (K, n, d).

    Raises:
      ValueError: a size or the scale is out of range, dtype is not floating, or `key` is
        not one PRNG key.

    Warns:
      UserWarning: `dim < num_classes - 1`. No simplex ETF fits then, so the flow cannot
        reach neural collapse.
    """
    weights = _left_out_weights(per_class, num_classes)
    most: Any = per_class if weights is None else weights.shape[1]
    check_sizes(num_classes=num_classes, per_class=most, dim=dim)
    check_key("key", key)
    dtype = float_dtype(dtype)
    check_scale(scale, dtype)
    if dim < num_classes - 1:
        warnings.warn(
            f"dim={dim} is below num_classes - 1 = {num_classes - 1}: no simplex ETF "
            "fits, so the flow cannot reach neural collapse",
            stacklevel=2,
        )
    key_W, key_H = jax.random.split(key)
    deviation = jnp.asarray(scale, dtype)
    params = Params(
        W=deviation * jax.random.normal(key_W, (num_classes, dim), dtype),
        H=deviation * jax.random.normal(key_H, (num_classes, most, dim), dtype),
    )
    return without_left_out(params, weights)


def _left_out_weights(per_class, num_classes: int) -> Array | None:
    """Return weights (K, n) for counts (K,), None for a single number."""
    if np.ndim(per_class) == 0:
        return None
    counts = check_counts(per_class)
    if len(counts) != num_classes:
        raise ValueError(
            f"per_class must hold a count for each of num_classes = {num_classes} classes, "
            f"got {len(counts)} counts"
        )
    return sample_weights(counts)


def simplex_etf(num_classes: int, dim: int, key: Array | None = None, dtype=None) -> Array:
    r"""Return a simplex equiangular tight frame, one unit vector per row.

    $$E = \sqrt{\tfrac{K}{K-1}}\,(I - \tfrac1K \mathbf 1 \mathbf 1^\top) P^\top,
    \qquad E E^\top = \tfrac{K}{K-1} (I - \tfrac1K \mathbf 1 \mathbf 1^\top)$$

    Rows sum to zero and have pairwise cosine `-1/(K-1)`.

    Args:
      num_classes: `K`, at least 2.
      dim: `d`, at least `K - 1`.
      key: PRNG key for a random orientation `P` (Haar distributed). If None, `P` holds
        the first K unit vectors, or for `dim = K - 1` the Helmert basis.
      dtype: floating dtype; JAX's default if None.

    Returns:
      (K, d) array.

    Raises:
      ValueError: a size is out of range, `dim < num_classes - 1`, or `key` is not one
        PRNG key.

    Source: Ji et al. (ICLR 2022), Definition 2.1, with `alpha = 1`.

    >>> import ncjax
    >>> etf = ncjax.simplex_etf(4, 6)
    >>> [round(float(etf[0] @ row), 4) for row in etf]
    [1.0, -0.3333, -0.3333, -0.3333]
    """
    check_sizes(num_classes=num_classes, dim=dim)
    if dim < num_classes - 1:
        raise ValueError(
            f"dim must be at least num_classes - 1 = {num_classes - 1} to hold a simplex "
            f"ETF, got {dim}"
        )
    dtype = float_dtype(dtype)
    wide = wide_dtype(dtype)
    if key is not None:
        check_key("key", key)
        frame = jax.random.orthogonal(key, dim, dtype=wide, m=num_classes - 1)
        rows = jnp.asarray(helmert(num_classes).T, wide)
        unit = matmul(rows, frame.T)
    elif dim >= num_classes:
        centring = np.eye(num_classes) - 1 / num_classes
        unit = jnp.asarray(np.pad(centring, ((0, 0), (0, dim - num_classes))), wide)
    else:
        unit = jnp.asarray(helmert(num_classes).T, wide)
    return (math.sqrt(num_classes / (num_classes - 1)) * unit).astype(dtype)


def helmert(size: int) -> np.ndarray:
    r"""Return an orthonormal basis, one vector per row, of the vectors that sum to zero.

    Returns a float64 NumPy array $B$ (size - 1, size) with $B B^\top = I$ and
    $B \mathbf 1 = 0$: row r is $(1, \dots, 1, -r, 0, \dots) / \sqrt{r (r + 1)}$.
    """
    r = np.arange(1, size)[:, None]
    column = np.arange(size)[None, :]
    rows = np.where(column < r, 1.0, np.where(column == r, -1.0 * r, 0.0))
    return rows / np.sqrt(r * (r + 1.0))


def squared_norm(params: Params | DeepParams) -> Array:
    r"""$|Z|^2 = |W|_F^2 + |H|_F^2$, a scalar; for `DeepParams` the sum over all factors.

    Half precision is computed in float32, which the result has. A square beyond the range
    of the dtype counts as 0 or infinity.
    """
    return kernels.squared_norm(widen(check_any_params(params)))


def margins(params: Params | DeepParams, weights=None) -> Array:
    r"""Pairwise margins $m_{kij} = (w_k - w_j)^\top h_{k,i}$, with `+inf` where j = k.

    The infinite entries make `jax_debug_infs` raise an error.

    Args:
      params: `W` (K, d) and `H` (K, n, d); or `DeepParams`.
      weights: (K, n) or (K,) weights of the samples or classes, not negative. The margins
        of a sample of weight 0 are `+inf`. None is 1 everywhere.

    Returns:
      (K, n, K) array, float32 for half precision. `margins(params).min()` is the dataset
      margin `q_min`; `margins(params).min(axis=-1)` holds the sample margins `q_ki`.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Ji et al. (ICLR 2022), Section 3.1.
    """
    params, weights = check_factors(params, weights)
    all_margins, others = margins_of_params(params)
    if weights is not None:
        others = others & (weights > 0)[..., None]
    return jnp.where(others, all_margins, jnp.inf)


@overload
def balance(params: Params) -> Array: ...


@overload
def balance(params: DeepParams) -> tuple[Array, ...]: ...


def balance(params: Params | DeepParams) -> Array | tuple[Array, ...]:
    r"""$W^\top W - \sum_{k,i} h_{k,i} h_{k,i}^\top$, conserved by the gradient flow.

    With L layers these are $W_1^\top W_1 - \sum_{k,i} h_{k,i} h_{k,i}^\top$ and
    $W_{l+1}^\top W_{l+1} - W_l W_l^\top$ for l = 1, ..., L - 1.

    A product below the range of the dtype counts as 0; one above it gives infinity or NaN.

    Args:
      params: `W` (K, d) and `H` (K, n, d), with rows of zeros for samples left out; or
        `DeepParams`.

    Returns:
      (d, d) symmetric array, zero at a neural collapse that is a global optimum; float32
      for half precision. For `DeepParams` a tuple of L such arrays (d_l, d_l), from l = 0.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    checked = widen(check_any_params(params))
    if isinstance(checked, DeepParams):
        return kernels.balances(checked)
    return kernels.balance(checked)


def block_saddle(
    num_blocks: int, block_size: int, per_class: int, dim: int, dtype=None
) -> Params:
    r"""Return a critical direction of the flow: `m` orthogonal blocks, each collapsed.

    Within a block of `b` classes the `w_k` form a simplex ETF, and blocks are orthogonal.
    Features are $h_{k,i} = w_k$. Balance then scales $W$ by $n^{1/4}$ and $H$ by
    $n^{-1/4}$. `num_blocks = 1` gives neural collapse, the global minimiser. With
    `num_blocks >= 2` the direction is a KKT direction of the minimum-norm separation
    problem and a strict saddle. Any multiple `c > 0` of it has the same direction.

    Args:
      num_blocks: `m`, at least 1.
      block_size: `b`, at least 2; the number of classes is `K = m b`.
      per_class: `n`, at least 1.
      dim: `d`, at least `m (b - 1)`.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `Params` with `W` (m b, d) and `H` (m b, n, d). Margins are `b/(b-1)` within a block
      and 1 across blocks.

    Raises:
      ValueError: a size is out of range, or the blocks do not fit into `dim`.

    Source: Example 3.1 of Ji et al. (ICLR 2022) is K = 4, b = 2, n = 1, up to scale; the
    family is ncjax's.
    """
    check_sizes(num_blocks=num_blocks, per_class=per_class, dim=dim)
    check_integer("block_size", block_size, least=2)
    if dim < num_blocks * (block_size - 1):
        raise ValueError(
            f"dim must be at least num_blocks * (block_size - 1) = "
            f"{num_blocks * (block_size - 1)}, got {dim}"
        )
    width = block_size if dim >= num_blocks * block_size else block_size - 1
    dtype = float_dtype(dtype)
    etf = simplex_etf(block_size, width, dtype=wide_dtype(dtype))
    W = jnp.kron(jnp.eye(num_blocks, dtype=etf.dtype), etf)
    W = jnp.pad(W, ((0, 0), (0, dim - num_blocks * width)))
    H = jnp.broadcast_to(W[:, None], (W.shape[0], per_class, dim))
    spread = per_class**0.25
    return Params(W=(spread * W).astype(dtype), H=(H / spread).astype(dtype))
