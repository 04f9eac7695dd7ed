r"""The regular polygon: K classes in the plane, and its saddle in more dimensions."""

import math

import numpy as np


def polygon_factors(num_classes: int, per_class: int) -> tuple[np.ndarray, ...]:
    """Return W (K, 2), the rows h_k (K, 2) and the multipliers λ_kj (K, K)."""
    angles = 2 * math.pi * np.arange(num_classes) / num_classes
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # The hull of the other classes has this distance from a vertex at radius 1.
    distance = 1 - math.cos(2 * math.pi / num_classes)
    radius = per_class**0.25 / math.sqrt(distance)
    steps = np.abs(np.arange(num_classes)[:, None] - np.arange(num_classes))
    neighbours = (steps == 1) | (steps == num_classes - 1)
    multiplier = 1 / (2 * math.sqrt(per_class) * distance)
    return radius * unit, unit / (radius * distance), multiplier * neighbours
