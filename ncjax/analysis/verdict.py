"""Put a collapse report into one sentence, and its limits into notes."""

import math
from collections.abc import Mapping

import numpy as np

# A set of features counts as collapsed within classes if Tr Σ_W is at most this share of
# Tr Σ_B, and as close to it up to the second share.
WITHIN, CLOSE = 0.01, 0.1
# Its class means count as a simplex ETF up to this mean deviation of a cosine, and up to
# this std/mean of their norms.
ANGLES, NORMS = 0.05, 0.1
# A classifier counts as dual to the class means up to this distance; 0 is dual, √2 is
# orthogonal to them, 2 is opposite.
DUALITY = 0.2

_FEW, _UNEQUAL, _ERRORS = 10, 2.0, 0.001


def verdict(values: Mapping[str, float], counts: np.ndarray, dim: int) -> str:
    """Return one sentence: whether features have collapsed, to what, and the classifier.

    Args:
      values: fields of `ncjax.CollapseMetrics` by name.
      counts: (K,) samples of each class measured.
      dim: d.
    """
    if counts.max() == 1:
        return "Undefined: every class has one sample, so none varies within its class."
    num_classes, within = counts.size, values["within_class_quotient"]
    if not math.isfinite(within):
        return (
            "Undefined: all class means are equal, at least in this precision, so there is "
            "no spread to compare with."
        )
    parts = [
        f"variation within classes is {within:.2g} times the spread of the class means",
        _angles(values["mean_cosine_deviation"], num_classes, dim),
    ]
    duality = values["centred_self_duality"]
    if math.isfinite(duality):
        # "but" if one of the two has collapsed and the other has not
        joint = "and" if (within <= CLOSE) == (duality <= DUALITY) else "but"
        parts.append(f"{joint} the classifier is {duality:.2g} from self-duality")
    return f"{_head(values, num_classes, dim)}: {', '.join(parts)}."


def _head(values: Mapping[str, float], num_classes: int, dim: int) -> str:
    within = values["within_class_quotient"]
    if within > CLOSE:
        return "Not collapsed"
    if within > WITHIN:
        return "Close to collapse"
    if dim < num_classes - 1:
        return "Collapsed within classes"
    is_simplex = (
        values["mean_cosine_deviation"] <= ANGLES and values["mean_norm_variation"] <= NORMS
    )
    return "Collapsed" if is_simplex else "Collapsed within classes, but not to a simplex"


def _angles(deviation: float, num_classes: int, dim: int) -> str:
    if dim < num_classes - 1:
        return f"no simplex of {num_classes} classes fits into {counted(dim, 'dimension')}"
    if num_classes == 2:
        return "two class means are always a simplex"
    cosine = -1 / (num_classes - 1)
    return (
        f"cosines of class means differ by {deviation:.2g} from the simplex's {cosine:.2g}"
    )


def notes(values: Mapping[str, float], counts: np.ndarray, min_count: int | None) -> list:
    """Return sentences on what limits the verdict: sizes of classes, errors.

    Args:
      values: fields of `ncjax.CollapseMetrics` by name.
      counts: (K,) samples of each class.
      min_count: least count of a class measured; None if all are.
    """
    measured = counts[counts >= (min_count or 1)]
    least, most = int(measured.min()), int(measured.max())
    found = []
    if measured.size < counts.size:
        found.append(
            f"{measured.size} of {counts.size} classes have at least "
            f"{counted(min_count or 1, 'sample')}, and are measured."
        )
    if most > 1 and least < _FEW:
        found.append(
            f"The smallest class has {counted(least, 'sample')}, and the mean of few "
            f"samples lies near them: NC1 comes out about {1 / least:.0%} too low there."
        )
    if most > _UNEQUAL * least:
        found.append(
            f"Classes have {least} to {counted(most, 'sample')}: the theory predicts a "
            "simplex and self-duality for classes of equal size only."
        )
    if values["accuracy"] < 1 - _ERRORS:
        found.append(
            f"The classifier is wrong on {1 - values['accuracy']:.1%} of the samples: the "
            "theory is about training beyond zero error."
        )
    return found


def counted(count: int, noun: str) -> str:
    """Return a number and a noun, in the plural unless the number is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
