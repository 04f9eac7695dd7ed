r"""Collapse of a deep layer-peeled model with weight decay: its two critical points.

$$F(Z) = \mathcal L(Z) + \tfrac\lambda2 \Bigl(\sum_{l=1}^L |W_l|_F^2 + |H|_F^2\Bigr)$$
"""

import math
from typing import NamedTuple

import numpy as np

from ncjax.checks import check_integer, check_positive, check_sizes, float_dtype
from ncjax.numerics import on_device
from ncjax.objectives.factors import unit_etf
from ncjax.objectives.roots import root, root_above
from ncjax.types import DeepParams

# Logarithms of margins below this: e^m is 1 to rounding, and m may be no number above 0.
_UNDERFLOW = -700


class CollapsedPoint(NamedTuple):
    """A balanced collapse: all margins are equal, and all factors have equal norms."""

    params: DeepParams
    margin: float  # m
    value: float  # F


class DecayedCollapse(NamedTuple):
    """The critical points on the ray of balanced collapse, apart from the origin."""

    minimum: CollapsedPoint | None  # None if the decay reaches the threshold
    barrier: CollapsedPoint | None  # the maximum on the way to it; None for one layer
    origin: float  # F(0) = K n log K
    threshold: float  # least decay without these points
    transition: float  # decay at which the minimum has the value of the origin

    @property
    def below_origin(self) -> bool:
        """Whether the minimum exists and has a smaller value than the origin."""
        return self.minimum is not None and self.minimum.value < self.origin


def decayed_collapse(
    num_classes: int,
    per_class: int,
    depth: int,
    weight_decay: float,
    *,
    dim: int | None = None,
    dtype=None,
) -> DecayedCollapse:
    r"""Return the collapsed critical points of cross entropy with decay of all factors.

    At the balanced collapse of margin m the p = L + 1 factors have K - 1 equal singular
    values $(\sqrt n\, m)^{1/p}$, and

    $$F(m) = K n \log(1 + (K-1) e^{-m}) + \lambda \tfrac p2 (K-1) (\sqrt n\, m)^{2/p}.$$

    F is critical, in all directions, if and only if

    $$\frac{\sqrt n K}{e^m + K - 1} = \lambda (\sqrt n\, m)^{2/p - 1}.$$

    For p >= 3 this has two roots below a threshold of $\lambda$, and none above it. The
    larger root is the minimum along the ray, the smaller one is the barrier between it and
    the origin, which is a local minimum for every $\lambda > 0$. Hence the transition is of
    first order: the minimum appears at a positive margin and above F(0), and it lies below
    F(0) for decays smaller than `transition`. Both decays grow like $n^{1-1/p}$. For one
    layer (p = 2) there is one root, no barrier, and both decays are $\sqrt n$.

    The minimum along the ray need not be the global minimum: for p >= 3 other softmax codes
    may have a smaller value.

    Args:
      num_classes: `K`.
      per_class: `n`, samples of each class.
      depth: `L`, the number of layers, at least 1.
      weight_decay: $\lambda$ of every factor, positive. The loss is a sum over samples.
      dim: width of all layers and of the features, at least K - 1, which is the default.
      dtype: floating dtype of the points; JAX's default if None. Roots are computed in
        float64 on the host.

    Returns:
      `DecayedCollapse`.

    Raises:
      ValueError: an argument is out of range.

    Source: ncjax.

    >>> import ncjax
    >>> found = ncjax.decayed_collapse(3, per_class=2, depth=3, weight_decay=0.03)
    >>> round(found.minimum.margin, 6), round(found.minimum.value, 6)
    (6.017508, 0.379222)
    >>> ncjax.decayed_collapse(3, 2, depth=3, weight_decay=2.0).minimum is None
    True
    """
    check_sizes(num_classes=num_classes, per_class=per_class)
    check_integer("depth", depth, least=1)
    check_positive("weight_decay", weight_decay)
    dim = num_classes - 1 if dim is None else dim
    check_integer("dim", dim, least=1)
    if dim < num_classes - 1:
        raise ValueError(
            f"dim must be at least num_classes - 1 = {num_classes - 1} to hold a collapse, "
            f"got {dim}"
        )
    ray = _Ray(num_classes, per_class, depth + 1)
    peak = ray.peak()
    minimum = barrier = None
    if weight_decay < ray.decay(peak):
        dtype = float_dtype(dtype)

        def point(margin: float) -> CollapsedPoint:
            value = ray.value(margin, weight_decay)
            return CollapsedPoint(_params(ray, margin, dim, dtype), margin, value)

        minimum = point(ray.above(peak, weight_decay))
        barrier = point(ray.below(peak, weight_decay)) if depth > 1 else None
    return DecayedCollapse(
        minimum=minimum,
        barrier=barrier,
        origin=num_classes * per_class * math.log(num_classes),
        threshold=ray.decay(peak),
        transition=ray.decay(ray.transition(peak)),
    )


class _Ray(NamedTuple):
    """Decays and values of collapsed points, as functions of the margin m."""

    num_classes: int
    per_class: int
    degree: int

    def decay(self, margin: float) -> float:
        """Return the decay at which the margin is critical; it rises, then falls."""
        return math.exp(self._log_decay(margin))

    def _log_decay(self, margin: float) -> float:
        rest = self.num_classes - 1
        log_slope = math.log(self.num_classes) + math.log(self.per_class) / 2
        log_slope -= margin + math.log1p(rest * math.exp(-margin))
        if self.degree == 2:
            return log_slope
        log_singular = math.log(self.per_class) / 2 + math.log(margin)
        return log_slope + (1 - 2 / self.degree) * log_singular

    def peak(self) -> float:
        """Return the margin of the largest decay, 0 for two factors."""
        if self.degree == 2:
            return 0.0
        rest, power = self.num_classes - 1, 1 - 2 / self.degree
        return root(
            lambda m: m / (1 + rest * math.exp(-m)) - power, 0.0, power * (rest + 1)
        )

    def above(self, peak: float, decay: float) -> float:
        """Return the larger margin that is critical at this decay."""
        return root_above(lambda m: self._log_decay(m) - math.log(decay), peak)

    def below(self, peak: float, decay: float) -> float:
        """Return the smaller margin that is critical at this decay."""
        power = 1 - 2 / self.degree
        # A lower bound of it, from e^m + K - 1 >= K.
        low = (math.log(decay) - (1 + power) / 2 * math.log(self.per_class)) / power
        if low < _UNDERFLOW:
            return math.exp(low)  # the bound to rounding, or 0
        return math.exp(
            root(
                lambda s: self._log_decay(math.exp(s)) - math.log(decay),
                low - 1,
                math.log(peak),
            )
        )

    def transition(self, peak: float) -> float:
        """Return the margin of the minimum whose value is the value of the origin."""
        if self.degree == 2:
            return 0.0
        rest, half = self.num_classes - 1, self.degree / 2

        def excess(m: float) -> float:
            shrunk = math.exp(-m)
            loss = math.log1p(rest * shrunk) - math.log1p(rest)
            return loss + half * rest * m * shrunk / (1 + rest * shrunk)

        return root_above(excess, peak)

    def value(self, margin: float, decay: float) -> float:
        """Return F."""
        size, rest = self.num_classes * self.per_class, self.num_classes - 1
        loss = size * math.log1p(rest * math.exp(-margin))
        half = self.degree / 2
        return loss + decay * half * rest * self.singular(margin) ** 2

    def singular(self, margin: float) -> float:
        """Return the singular value of every factor."""
        return (math.sqrt(self.per_class) * margin) ** (1 / self.degree)


def _params(ray: _Ray, margin: float, dim: int, dtype) -> DeepParams:
    """Return the balanced factors."""
    num_classes, size = ray.num_classes, ray.singular(margin)
    etf = unit_etf(num_classes, dim) * math.sqrt((num_classes - 1) / num_classes)
    inner = on_device(size * etf.T @ etf, dtype)  # on the span of the rows of etf
    rows = np.repeat(etf[:, None], ray.per_class, axis=1) / math.sqrt(ray.per_class)
    layers = (inner,) * (ray.degree - 2) + (on_device(size * etf, dtype),)
    return DeepParams(layers, on_device(size * rows, dtype))
