"""`Params`, `DeepParams` and `BiasedParams`, the free variables of layer-peeled models."""

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


class DeepParams(NamedTuple):
    r"""Free variables $Z = (W_1, \dots, W_L, H)$ of the deep linear layer-peeled model.

    The logits are $W_L \cdots W_1 h_{k,i}$. The margins are homogeneous of degree p = L + 1
    in Z: $m(cZ) = c^p m(Z)$. With one layer it is the model of `Params(W_1, H)`.
    """

    layers: tuple[Array, ...]  # W_1 (d_1, d_0), ..., W_L (K, d_{L-1}), features to logits
    H: Array  # (K, n, d_0)  features, the input of the first layer

    @property
    def W(self) -> Array:
        """The classifier `W_L` (K, d_{L-1}), the last layer."""
        return self.layers[-1]

    @property
    def degree(self) -> int:
        """The number of factors `p = L + 1`, the degree of the margins."""
        return len(self.layers) + 1


class BiasedParams(NamedTuple):
    """Free variables `(W, H, b)` of an objective with a bias; the logits are `W h + b`."""

    W: Array  # (K, d)     classifier
    H: Array  # (K, n, d)  features
    b: Array  # (K,)       bias of the logits

    @property
    def unbiased(self) -> Params:
        """`Params(W, H)`, for the functions that take no bias."""
        return Params(self.W, self.H)
