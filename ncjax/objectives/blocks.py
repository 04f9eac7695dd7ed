"""One block of an otherwise merged set of classes: the pull within it."""

import math

import numpy as np


def log_pull_within(size: int, others: int, margin: float) -> float:
    r"""Return the logarithm of $1 - p_\text{own} + p_\text{in}$, which falls from 0.

    The logits are $c (e_k - 1_b / b)$ in a block of b classes and 0 in the other classes.
    $p_\text{in}$ is the probability of another class of the block.
    """
    exponents = log_probabilities(size, others, margin)
    return float(
        np.logaddexp(math.log(size) + exponents[1], math.log(others) + exponents[2])
    )


def log_probabilities(size: int, others: int, margin: float) -> tuple[float, float, float]:
    """Return the logarithms of the probabilities: own, within the block, beyond it."""
    own, within = margin * (1 - 1 / size), -margin / size
    terms = [own, math.log(others)] + ([within + math.log(size - 1)] if size > 1 else [])
    normaliser = float(np.logaddexp.reduce(terms))
    return own - normaliser, within - normaliser, -normaliser
