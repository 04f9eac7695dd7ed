"""`Params` and `BiasedParams`, the free variables of the layer-peeled model."""

from typing import NamedTuple

import jax

Array = jax.Array


class Params(NamedTuple):
    """Free variables `Z = (W, H)` of the unconstrained layer-peeled model.

    Equation (1) of Ji et al. (ICLR 2022) optimises the last layer and its features
    directly, without the network that computes the features.
    """

    W: Array  # (K, d)     classifier, row w_k belongs to class k
    H: Array  # (K, n, d)  features, h_{k,i} is the i-th sample of class k


class BiasedParams(NamedTuple):
    """Free variables `(W, H, b)` of an objective with a bias; the logits are `W h + b`."""

    W: Array  # (K, d)     classifier
    H: Array  # (K, n, d)  features
    b: Array  # (K,)       bias of the logits

    @property
    def unbiased(self) -> Params:
        """`Params(W, H)`, for the functions that take no bias."""
        return Params(self.W, self.H)
