"""The cells of the deep experiment: classes, factors, width, and scale of the starts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments._runs.errors import BadUse


class Cell(NamedTuple):
    """One combination of settings, followed from many starts."""

    num_classes: int  # K
    factors: int  # p
    scale: float  # of the start: standard deviation of an entry times the root of d
    per_class: int  # n
    width: int  # d, of all layers

    @property
    def name(self) -> str:
        """The name of the part of the run; all digits tell two close scales apart."""
        size = f"K={self.num_classes}/p={self.factors}/d={self.width}"
        return f"{size}/scale={self.scale!r}"

    @property
    def shape(self) -> "Cell":
        """The cell without its scale: cells of one shape share their programs."""
        return self._replace(scale=1.0)


def cells(config: Any) -> list[Cell]:
    """Return the cells of a run, scale by scale.

    Raises:
      BadUse: a list is empty, or one of its numbers is not of its kind or out of range.
    """
    classes = numbers("num_classes", config.num_classes, int, least=2)
    factors = numbers("factors", config.factors, int, least=2)
    widths = numbers("widths", config.widths, int, least=1)
    scales = numbers("scales", config.scales, float, least=0)
    return [
        Cell(num_classes, p, scale, config.per_class, width * num_classes)
        for num_classes in classes
        for width in widths
        for p in factors
        for scale in scales
    ]


def numbers(name: str, text: str, kind: Callable[[str], Any], least: float) -> list[Any]:
    """Return the numbers of a flag, separated by commas, in ascending order.

    Raises:
      BadUse: there is none, one stands twice, or one is not finite or below `least`; a
        `float` must lie above it.
    """
    example = "4,6" if kind is int else "0.1,1"
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        noun = "integers" if kind is int else "numbers"
        raise BadUse(
            f"--{name} must be {noun} separated by commas, such as {example}, got {text!r}"
        ) from None
    bound = f"at least {least}" if kind is int else f"finite and above {least}"
    for number in found:
        good = number >= least if kind is int else math.isfinite(number) and number > least
        if not good:
            raise BadUse(f"--{name} must be {bound}, got {number:g} in {text!r}")
    if len(set(found)) < len(found):
        raise BadUse(f"--{name} must not repeat a number, got {text!r}")
    return sorted(found)
