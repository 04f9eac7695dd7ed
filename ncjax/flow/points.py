"""Points of any depth: the flow takes `Params` as a deep point of one layer.

The leaves of both kinds are the factors in order, the layers `W_1` to `W_L` and then `H`.
"""

from typing import TypeVar

import jax

from ncjax.checks import check_params
from ncjax.peeled.deep import check_deep_params, factors_at
from ncjax.types import DeepParams, Params

Point = TypeVar("Point", Params, DeepParams)


def check_any_params(params: Point, *, finite: bool = False) -> Point:
    """Return a point of any depth as JAX arrays.

    Raises:
      ValueError: as `check_params` and `check_deep_params`.
    """
    if isinstance(params, DeepParams):
        return check_deep_params(params, finite=finite)
    return check_params(params, finite=finite)


def degree(params: Params | DeepParams) -> int:
    """Return the number of factors, the degree p of the margins."""
    return len(jax.tree.leaves(params))


def as_deep(params: Params | DeepParams) -> DeepParams:
    """Return a point of any depth with its layers in a tuple."""
    *layers, H = jax.tree.leaves(params)
    return DeepParams(tuple(layers), H)


def like(params: Point, layers, H) -> Point:
    """Return a point of the kind of `params` with these factors."""
    return jax.tree.unflatten(jax.tree.structure(params), [*layers, H])


def last_factors(params: Params | DeepParams) -> Params:
    """Return two factors with the logits of a point: its last layer and the input of it."""
    if isinstance(params, DeepParams):
        return factors_at(params, len(params.layers) - 1)
    return params
