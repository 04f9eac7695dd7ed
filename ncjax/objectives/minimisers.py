r"""Minimisers in closed form, or by one scalar equation.

Every sample of a class has the same feature at a minimiser, so the logits are a matrix (K,
K). `collapse` has the balanced cases, `squared` the squared error, `step` two sizes of
classes, `fixed` a fixed classifier, and `factors` the factors W and H of given logits.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ncjax.checks import float_dtype
from ncjax.objectives.collapse import collapsed, normalised
from ncjax.objectives.factors import factorise
from ncjax.objectives.fixed import fixed_classifier
from ncjax.objectives.objective import Objective
from ncjax.objectives.problem import (
    Optimum,
    Problem,
    class_margins,
    make_problem,
    refuse,
    value_of,
)
from ncjax.objectives.squared import squared_error
from ncjax.objectives.step import Group, solve_ball, solve_penalty, step_logits
from ncjax.peeled.weights import sample_weights
from ncjax.types import Array, BiasedParams, Params


class Minimiser(NamedTuple):
    """A minimiser of an objective, its value, its margins and its source."""

    params: Params | BiasedParams
    weights: Array | None  # (K, n) weights of the samples; None if all are 1
    value: float  # of the objective
    margin: float  # least margin of a sample
    margins: np.ndarray  # (K,) least margin of each class
    proved: bool  # whether global optimality is proved in this range
    source: str  # paper of the statement


def minimiser(
    objective: Objective, counts, dim: int, *, class_weights=None, dtype=None
) -> Minimiser:
    r"""Return a global minimiser of an objective, in closed form.

    $$M = W H^\top = \arg\min_M \ell(M) + \mu |M|_*, \quad \mu = \sqrt{\lambda_W \lambda_H},
    \qquad \lambda_W W^\top W = \lambda_H H^\top H$$

    with weight decay, and $|M|_* \le \sqrt{ab}$ on the ball. Closed forms exist for

    - classes of one size: cross entropy, with label smoothing, or focal loss; with weight
      decay, on the ball, at a temperature; without bias, or with one, which is then 0
    - squared error: any sizes without bias or with a free bias, one size with decay of it
    - two sizes of classes (STEP): cross entropy without bias, also on the ball
    - a fixed classifier with any sizes

    The layer-peeled model of Fang et al. (2021) bounds class means. It is
    `counts=(1, ..., 1)`, `class_weights=n_k`, `ball=(K * E_W, K * E_H)`.

    Args:
      objective: the objective, regularised.
      counts: (K,) number of samples of each class, $n_k$.
      dim: `d`, at least the rank of the optimal logits, which is at most K - 1 for the
        cross entropy. For the squared error the d largest singular values are kept.
      class_weights: (K,) positive weights of the classes in the loss; 1 if None.
      dtype: floating dtype of the point; JAX's default if None. The computation runs in
        float64 on the host.

    Returns:
      `Minimiser`. A sample that `counts` leaves out has a feature of zeros. The point is
      unique up to a rotation of the feature space; any rotation of it is a minimiser too.

    Raises:
      ValueError: an argument does not fit, the objective has no minimiser, or no closed
        form is known.

    >>> import ncjax
    >>> objective = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))
    >>> best = ncjax.minimiser(objective, counts=(3, 3, 3, 3), dim=6)
    >>> round(best.value, 6), round(best.margin, 6), best.proved
    (2.710425, 4.193919, True)
    """
    dtype = float_dtype(dtype)
    problem = make_problem(objective, counts, dim, class_weights)
    equal = class_weights is None and len(np.unique(problem.counts)) == 1
    weights = None if equal else sample_weights(counts, class_weights, dtype)
    optimum = _solver(problem)(problem)
    margins = class_margins(problem, optimum)
    return Minimiser(
        params=_params(problem, optimum, dtype),
        weights=weights,
        value=value_of(problem, optimum),
        margin=float(margins.min()),
        margins=margins,
        proved=optimum.proved,
        source=optimum.source,
    )


def _solver(problem: Problem):
    """Return the function that solves this case, or raise ValueError."""
    objective = problem.objective
    if callable(objective.loss):
        refuse("a loss of your own")
    _check_minimiser_exists(objective)
    if objective.temperature is not None:
        return _balanced_only(problem, "the model with a temperature", normalised)
    if objective.fixed_classifier:
        return fixed_classifier
    if objective.loss == "squared_error":
        return squared_error
    return collapsed if problem.balanced else _imbalanced


def _check_minimiser_exists(objective: Objective) -> None:
    if objective.loss == "squared_error" and objective.temperature is not None:
        refuse("the squared error at a temperature")
    if not objective.regularised:
        if objective.loss == "squared_error" or objective.smoothing:
            raise ValueError(
                "the minimisers of this loss alone form an unbounded set: give the "
                "objective weight_decay or a ball"
            )
        raise ValueError(
            "the loss alone has no minimiser, its norm grows for ever: "
            "ncjax.solve_separation gives the direction, or give weight_decay or a ball"
        )
    decay = objective.weight_decay
    if decay is not None and min(decay[objective.fixed_classifier :]) <= 0:
        raise ValueError(
            f"weight_decay must be positive for every factor that moves, got {decay}: "
            "else the norm moves to the free factor and no minimum is reached"
        )


def _balanced_only(problem: Problem, what: str, solver):
    if not problem.balanced:
        refuse(f"{what} and classes of different sizes or weights")
    return solver


def _imbalanced(problem: Problem) -> Optimum:
    """Return the minimiser for two groups of classes."""
    objective = problem.objective
    if objective.loss == "focal" or objective.smoothing:
        refuse("the focal or smoothed loss and classes of different sizes or weights")
    if objective.bias is not None:
        refuse("a bias and classes of different sizes or weights")
    pairs = np.stack([problem.counts, problem.weights], axis=1)
    kinds, kind = np.unique(pairs, axis=0, return_inverse=True)
    if len(kinds) > 2:
        refuse(f"{len(kinds)} different sizes or weights of classes (at most 2)")
    first = kind.reshape(-1) == 1
    groups = [
        Group(int(np.sum(mask)), float(n * weight), math.sqrt(n))
        for (n, weight), mask in zip(kinds[::-1], (first, ~first), strict=True)
    ]
    if objective.ball is None:
        step = solve_penalty(math.log(problem.mu), *groups)
    else:
        _, step = solve_ball(problem.tau, *groups)
        step = step.of_norm(problem.tau)  # a small norm has lost digits
    W, H = factorise(problem, step_logits(step, first))
    return Optimum(W, H, True, _STEP)


_STEP = "ncjax, convex in the logits; block structure: Hong and Ling (2023)"


def _params(problem: Problem, optimum: Optimum, dtype) -> Params | BiasedParams:
    """Return the point in a dtype, with zeros for the samples that counts leave out."""
    places = np.arange(int(problem.counts.max()))
    kept = places[None, :, None] < problem.counts[:, None, None]
    H = np.where(kept, optimum.H[:, None, :], 0)
    params = Params(jnp.asarray(optimum.W, dtype), jnp.asarray(H, dtype))
    if optimum.b is None:
        return params
    return BiasedParams(*params, jnp.asarray(optimum.b, dtype))
