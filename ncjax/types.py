"""The state of the layer-peeled model."""

from typing import NamedTuple

import jax

Array = jax.Array


class Params(NamedTuple):
    """Free variables `Z = (W, H)` of the unconstrained layer-peeled model.

    Ji et al. (ICLR 2022), equation (1): the last layer and its features are
    optimised directly, with nothing else in between.
    """

    W: Array  # (K, d)     classifier, row w_k is the weight of class k
    H: Array  # (K, n, d)  features, h_{k,i} is the i-th sample of class k
