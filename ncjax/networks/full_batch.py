r"""The loss of a whole data set as one function of a network's parameters.

The set is cut into fixed *groups* that fit into memory. Batch normalisation runs in
training mode: it averages over a group, so the loss does not depend on running averages.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_integer
from ncjax.networks import data, models
from ncjax.networks.data import Dataset
from ncjax.networks.loss_clock import log_losses
from ncjax.types import Array


class Groups(NamedTuple):
    """A data set in G groups of B images each."""

    images: Array  # (G, B, height, width, C) uint8
    labels: Array  # (G, B) int32
    mean: Array  # (C,) float32, of images / 255
    deviation: Array  # (C,) float32


def split(dataset: Dataset, num_groups: int = 1) -> Groups:
    """Cut a data set into groups that have equally many samples of each class, or nearly.

    The samples are sorted by class, and dealt to the groups in turn.

    Args:
      dataset: N images.
      num_groups: G, a divisor of N.

    Raises:
      ValueError: `num_groups` does not divide N.
    """
    check_integer("num_groups", num_groups, least=1)
    size = len(dataset.labels)
    if size % num_groups:
        raise ValueError(
            f"num_groups must divide the {size} images of the set, got {num_groups}"
        )
    order = np.argsort(dataset.labels, kind="stable").reshape(-1, num_groups).T
    statistics = data.channel_statistics(dataset.images)
    arrays = (dataset.images[order], dataset.labels[order], *statistics)
    return Groups(*map(jnp.asarray, arrays))


def log_loss(model: nn.Module, groups: Groups, params: Any) -> tuple[Array, Any]:
    r"""Return $\log \mathcal L(\theta)$ and its gradient.

    $$\mathcal L(\theta) = \sum_a \log\Bigl(1 + \sum_{j \ne y_a}
    e^{-(z_{a y_a} - z_{aj})}\Bigr)$$

    It is computed from the logarithms of all terms, so it stays exact when they underflow.
    The groups are combined by $\nabla \log \mathcal L = \sum_g \frac{\mathcal
    L_g}{\mathcal L} \nabla \log \mathcal L_g$.

    Args:
      model: a network of `ncjax.networks.models`.
      groups: of `split`.
      params: θ, the parameters of the network.

    Returns:
      A scalar, and a pytree like `params`.
    """

    def of_group(params, images, labels):
        logits, _ = _apply(model, groups, params, images)[0]
        return jax.nn.logsumexp(log_losses(logits, labels))

    value_and_slope = jax.value_and_grad(of_group)
    first = value_and_slope(params, groups.images[0], groups.labels[0])
    if groups.labels.shape[0] == 1:
        return first

    def add(total, group):
        value, slope = value_and_slope(params, *group)
        both = jnp.logaddexp(total[0], value)
        share, other = jnp.exp(total[0] - both), jnp.exp(value - both)
        return (both, jax.tree.map(lambda a, b: share * a + other * b, total[1], slope)), ()

    return jax.lax.scan(add, first, (groups.images[1:], groups.labels[1:]))[0]


def features(model: nn.Module, groups: Groups, params: Any) -> tuple[Array, Array]:
    """Return the features (N, d) in training mode, and their labels (N,).

    The samples are in the order of the groups. These are the features of the function
    whose gradient flow `log_loss` gives.
    """

    def of_group(images):
        return _apply(model, groups, params, images)[0][1]

    found = jax.lax.map(of_group, groups.images)
    return found.reshape(-1, found.shape[-1]), groups.labels.reshape(-1)


def batch_statistics(model: nn.Module, groups: Groups, params: Any) -> Any:
    """Return the means and variances of batch normalisation, averaged over the groups.

    With them the network can be evaluated on any image: with one group, evaluation mode
    equals training mode on the set. Empty for a network without batch normalisation.
    """

    def of_group(images):
        # The running averages start at zero, so the update holds a known share of the new.
        updated = _apply(model, groups, params, images)[1].get("batch_stats", {})
        return jax.tree.map(lambda leaf: leaf / (1 - models.MOMENTUM), updated)

    found = jax.lax.map(of_group, groups.images)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)


def _apply(model: nn.Module, groups: Groups, params: Any, images: Array):
    """Apply the network in training mode, with running averages of zero."""
    shapes = models.abstract_variables(model, images.shape[1:]).get("batch_stats", {})
    averages = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    images = data.normalise(images, groups.mean, groups.deviation)
    return model.apply(
        {"params": params, "batch_stats": averages},
        images,
        train=True,
        mutable=["batch_stats"],
    )
