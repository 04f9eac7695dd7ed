r"""Points of any depth, `Params` or `DeepParams`, and the two factors at each layer.

The leaves of both kinds are the factors in order, the layers $W_1$ to $W_L$ and then H.
Every layer l splits the logits $W_L \cdots W_1 h$ into two factors, the classifier $W_L
\cdots W_{l+1}$ and the features $W_l \cdots W_1 h$. A function of the logits alone takes
the factors at the last layer.
"""

from typing import TypeVar

import jax

from ncjax.checks import check_params
from ncjax.numerics import einsum, matmul
from ncjax.peeled.deep import check_deep_params
from ncjax.peeled.weights import counted_point
from ncjax.types import Array, DeepParams, Params

Point = TypeVar("Point", Params, DeepParams, Params | DeepParams)


def check_any_params(params: Point, *, finite: bool = False) -> Point:
    """Return a point of any depth as JAX arrays.

    Raises:
      ValueError: as `check_params` and `check_deep_params`.
    """
    if isinstance(params, DeepParams):
        return check_deep_params(params, finite=finite)
    if isinstance(params, tuple):
        return check_params(params, finite=finite)
    given = type(params).__name__
    raise ValueError(
        f"expected ncjax.Params(W, H) or ncjax.DeepParams(layers, H), got {given}"
    )


def degree_of(params: Params | DeepParams) -> int:
    """Return the number p of factors, the degree of the margins."""
    return len(jax.tree.leaves(params))


def as_deep(params: Params | DeepParams) -> DeepParams:
    """Return a point of any depth with its layers in a tuple."""
    *layers, H = jax.tree.leaves(params)
    return DeepParams(tuple(layers), H)


def like(params: Point, layers, H) -> Point:
    """Return a point of the kind of `params` with these factors."""
    return jax.tree.unflatten(jax.tree.structure(params), [*layers, H])


def check_deep_point(
    params: DeepParams, weights, *, finite: bool = False
) -> tuple[DeepParams, Array | None]:
    """Return a deep point without the samples left out, and weights (K, n) or None.

    Half precision becomes float32.

    Raises:
      ValueError: as `check_deep_params` and `check_weights`.
    """
    return counted_point(check_deep_params(params, finite=finite), weights)


def check_factors(params: Params | DeepParams, weights) -> tuple[Params, Array | None]:
    """Return two factors with the logits of a point of any depth, and weights or None.

    Functions of the logits alone take points of any depth by this.

    Raises:
      ValueError: as `check_any_point`.
    """
    params, weights = check_any_point(params, weights)
    return last_factors(params), weights


def check_any_point(params, weights, *, finite: bool = False):
    """Return a point of any depth without the samples left out, and weights or None.

    Raises:
      ValueError: as `check_any_params` and `check_weights`.
    """
    return counted_point(check_any_params(params, finite=finite), weights)


def last_factors(params: Params | DeepParams) -> Params:
    """Return the two factors at the last layer of a point of any depth."""
    if isinstance(params, DeepParams):
        return factors_at(params, len(params.layers) - 1)
    return params


def factors_at(params: DeepParams, layer: int) -> Params:
    r"""Return the two factors at a layer, `Params` with the logits of `params`.

    The classifier is $W_L \cdots W_{l+1}$ (K, d_l) and the features are $W_l \cdots W_1 h$
    (K, n, d_l).

    Args:
      params: point that is checked already.
      layer: l, from 0 for `H` itself to L - 1 for the input of the classifier.
    """
    H, W = params.H, params.layers[-1]
    for below in params.layers[:layer]:
        H = einsum("kid,ed->kie", H, below)
    for above in reversed(params.layers[layer:-1]):
        W = matmul(W, above)
    return Params(W, H)
