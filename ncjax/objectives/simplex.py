"""Curvature of the cross entropy at the logits of a simplex ETF."""

import math
from typing import NamedTuple

import numpy as np


class Curvature(NamedTuple):
    """Numbers that the blocks of the Hessian share, for K >= 3 classes."""

    num_classes: int
    eps: float  # probability of each other class
    kap: float  # K eps p, the curvature along the own class

    @classmethod
    def at(cls, num_classes: int, margin: float) -> "Curvature":
        """Return the numbers at logits `m (e_k - 1/K)`."""
        eps = float(np.exp(-np.logaddexp(margin, math.log(num_classes - 1))))
        own = 1 / (1 + (num_classes - 1) * math.exp(-margin))
        return cls(num_classes, eps, num_classes * eps * own)

    @property
    def c2(self) -> float:
        """`(K - 2) / K`."""
        return (self.num_classes - 2) / self.num_classes

    @property
    def A(self) -> float:
        """Curvature within a column."""
        K = self.num_classes
        return self.kap * (1 - 3 / K) + self._total / K**2

    @property
    def B(self) -> float:
        """Curvature between a column and its own class."""
        return (self.kap - self._total / self.num_classes) / math.sqrt(self.num_classes)

    @property
    def C(self) -> float:
        """Curvature of the own class."""
        return self._total / self.num_classes

    @property
    def _total(self) -> float:
        K = self.num_classes
        return K / (K - 1) * (self.kap + self.eps * (K - 2))

    def unit_block(self, per_class: int, t0: float, g: float) -> np.ndarray:
        """Return the (2, 2) block of the model with unit rows that occurs K - 1 times."""
        K, n, A, B, C = self.num_classes, per_class, self.A, self.B, self.C
        x = 1 / math.sqrt(self.c2 * (K - 1))
        y = x / math.sqrt(n)
        fold = self.c2 * math.sqrt(K)
        scale = n * t0**2 * K / (K - 1)
        own = scale * A * x**2 + n * g
        other = scale * (A - 2 * B * fold + C * fold**2) * y**2 + g
        between = scale * x * y * (A - B * fold) - n * g * self.c2 * x * y
        return np.array([[own, between], [between, other]])
