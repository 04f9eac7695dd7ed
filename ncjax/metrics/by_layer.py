r"""Measure neural collapse in every layer of the deep layer-peeled model.

Each layer splits the logits $W_L \cdots W_1 h$ into two factors. The metrics of the layer
are the metrics of these factors, by the functions that `ncjax.layerwise` takes for the
layers of a network.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.metrics.collapse import CollapseMetrics, collapse_metrics
from ncjax.metrics.depth import FeatureRank, feature_rank
from ncjax.numerics import at_unit_scale, einsum, power_of_two
from ncjax.peeled.points import check_deep_point, factors_at
from ncjax.singular import singular_values
from ncjax.types import Array, DeepParams, Params


class CollapseByLayer(NamedTuple):
    r"""Metrics of the L layers of a deep model, from `H` itself to the classifier's input.

    Layer l, counted from 0, has the features $W_l \cdots W_1 h_{k,i}$ and the classifier
    $W_L \cdots W_{l+1}$.
    """

    collapse: CollapseMetrics  # arrays (L,)
    ranks: FeatureRank  # arrays (L,)
    singular_values: Array  # (L, r) of the features (N, d_l) in descending order


def collapse_by_layer(params: DeepParams, weights=None) -> CollapseByLayer:
    r"""Return the collapse, the ranks and the singular values of every layer's features.

    NC3 of layer l compares the rows of $W_L \cdots W_{l+1}$ with the class means of the
    features $W_l \cdots W_1 h$. The ranks are of features centred at their mean; the
    singular values are of the features as they are, a row for each sample. At a balanced
    point whose logits have the singular values $\sigma_i$, they are
    $\sigma_i^{(l+1)/p}$ with p = L + 1.

    Args:
      params: `layers` W_1 (d_1, d_0), ..., W_L (K, d_{L-1}) and `H` (K, n, d_0).
      weights: (K, n) or (K,) weights of the samples or classes, not negative. Samples of
        weight 0 are left out; all others count alike. None is 1 everywhere.

    Returns:
      `CollapseByLayer`, float32 for half precision. With layers of different widths,
      r = min(K n, largest width), and zeros follow the singular values of a narrow layer. A
      metric that is undefined (equal class means, a classifier of 0) is NaN. No scale of
      the factors overflows, except in singular values that exceed the dtype.

    Raises:
      ValueError: shapes, dtypes or weights do not fit.

    Source: Súkeník, Lampert, Mondelli (NeurIPS 2024) for collapse in every layer; Masarczyk
    et al. (2023) for the numerical rank.

    >>> import jax, ncjax
    >>> start = ncjax.init_deep_params(jax.random.key(0), 4, 2, widths=(6, 5, 5))
    >>> layers = ncjax.collapse_by_layer(start)
    >>> layers.collapse.self_duality.shape, layers.singular_values.shape
    ((3,), (3, 6))
    """
    params, weights = check_deep_point(params, weights)
    return _by_layer(params, None if weights is None else weights > 0)


@jax.jit
def _by_layer(params: DeepParams, counted: Array | None) -> CollapseByLayer:
    depth = len(params.layers)
    # No metric depends on the scale of a factor; the products may overflow.
    scales = jnp.stack([power_of_two(leaf) for leaf in (params.H, *params.layers[:-1])])
    unit = jax.tree.map(at_unit_scale, params)
    every = [factors_at(unit, layer) for layer in range(depth)]
    # Columns of zeros change no metric, and layers of one width need one program.
    width = max(factors.W.shape[-1] for factors in every)
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack([_widened(leaf, width) for leaf in leaves]), *every
    )

    def measure(factors: Params) -> CollapseByLayer:
        rows = factors.H.reshape(-1, width)
        return CollapseByLayer(
            collapse=collapse_metrics(factors, counted),
            ranks=feature_rank(_counted_rows(factors.H, counted)),
            singular_values=singular_values(rows),
        )

    found = jax.vmap(measure)(stacked)
    sizes = jnp.cumprod(scales)[:, None]
    return found._replace(singular_values=sizes * found.singular_values)


def _widened(leaf: Array, width: int) -> Array:
    """Append columns of zeros up to a width."""
    missing = width - leaf.shape[-1]
    return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, missing)])


def _counted_rows(H: Array, counted: Array | None) -> Array:
    """Return the samples as rows, with the mean of all others for a sample left out."""
    rows = H.reshape(-1, H.shape[-1])
    if counted is None:
        return rows
    share = counted.reshape(-1).astype(H.dtype)
    mean = einsum("i,id->d", share, rows) / jnp.sum(share)
    return jnp.where(share[:, None] > 0, rows, mean)
