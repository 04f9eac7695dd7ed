"""A statement of the theory with the number that was computed for it."""

from typing import NamedTuple

NCJAX = "ncjax"  # source of the statements of this software


class Statement(NamedTuple):
    """One statement, the number found and its bound."""

    source: str
    statement: str
    on: str
    number: float
    bound: float
    passed: bool


def below(source: str, statement: str, on: str, number, bound: float) -> Statement:
    """Return a statement that holds if `number` is at most `bound`."""
    number = float(number)
    return Statement(source, statement, on, number, bound, bool(number <= bound))
