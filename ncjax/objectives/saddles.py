"""Critical points that are not minima, in closed form, with their unstable eigenvalue."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_integer, check_sizes, float_dtype
from ncjax.objectives.blocks import log_probabilities, log_pull_within
from ncjax.objectives.coupling import pair
from ncjax.objectives.factors import factorise
from ncjax.objectives.objective import Objective
from ncjax.objectives.problem import Optimum, Problem, make_problem, value_of
from ncjax.objectives.roots import root_above
from ncjax.types import Params


class CriticalPoint(NamedTuple):
    r"""A strict saddle of an objective.

    G is the gradient in the logits. The point is a global minimum if and only if
    $\sigma_{\max}(G) \le \mu$. Here it is not, and in directions that leave the span of W
    and H the Hessian has the eigenvalue

    $$\tfrac{\lambda_W + \lambda_H}{2} - \sqrt{\left(\tfrac{\lambda_W -
    \lambda_H}{2}\right)^2 + \sigma_{\max}^2}$$
    """

    params: Params
    value: float  # of the objective
    sigma_max: float  # largest singular value of G
    eigenvalue: float  # the only negative one
    multiplicity: int


def block_point(
    objective: Objective,
    num_blocks: int,
    block_size: int,
    per_class: int,
    dim: int,
    dtype=None,
) -> CriticalPoint:
    r"""Return the saddle with `m` orthogonal blocks, each a simplex ETF of `b` classes.

    The logits are $c (e_k - 1_b/b)$ within a block and 0 across blocks. With weight decay
    $\sqrt n\, (b\, p_\text{in} + (K - b)\, p_\times - \alpha) = \mu$ fixes c, on a ball
    $(K - m) \sqrt n\, c = \sqrt{ab}$ does. $p_\text{in}$ and $p_\times$ are the
    probabilities of another class within and beyond the block, and $\sigma_{\max} = \sqrt
    n (K p_\times - \alpha)$ occurs m - 1 times.

    Args:
      objective: cross entropy, also with label smoothing $\alpha$, with weight decay or on
        a ball, without bias.
      num_blocks: `m`, at least 2. The number of classes is K = m b.
      block_size: `b`, at least 1; 1 is the origin.
      per_class: `n`, samples of each class.
      dim: `d`, above the rank K - m of the point.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `CriticalPoint` with multiplicity (m - 1) (d - K + m). On a ball the eigenvalue is
      one of `objective.on_boundary`.

    Raises:
      ValueError: an argument does not fit, or the decay is so large that the blocks merge.

    Source: ncjax; Example 3.1 of Ji et al. (ICLR 2022) is its limit without decay.
    """
    dtype = float_dtype(dtype)
    check_integer("num_blocks", num_blocks, least=2)
    check_integer("block_size", block_size, least=1)
    size = num_blocks * block_size
    problem = _problem(objective, "cross_entropy", size, per_class, dim, size - num_blocks)
    others, root_n = size - block_size, math.sqrt(per_class)
    alpha = float(objective.smoothing or 0.0)
    if objective.ball is not None:
        if block_size == 1:
            raise ValueError("block_size must be at least 2 on a ball, got 1: the origin")
        margin = problem.tau / ((size - num_blocks) * root_n)
    else:
        margin = _margin(block_size, others, problem.mu / root_n + alpha)
    blocks = np.kron(np.eye(num_blocks), np.eye(block_size) - 1 / block_size)
    mu = problem.mu
    if objective.ball is not None:
        mu = root_n * (math.exp(log_pull_within(block_size, others, margin)) - alpha)
        if mu <= 0:
            raise ValueError(
                f"ball must hold no minimiser within the blocks, got {objective.ball}: "
                "smoothing pulls the norm inside"
            )
    across = math.exp(log_probabilities(block_size, others, margin)[2])
    return _point(
        problem,
        margin * blocks,
        mu=mu,
        sigma_max=root_n * (size * across - alpha),
        multiplicity=(num_blocks - 1) * (dim - size + num_blocks),
        dtype=dtype,
    )


def rank_point(
    objective: Objective,
    rank: int,
    num_classes: int,
    per_class: int,
    dim: int,
    dtype=None,
) -> CriticalPoint:
    r"""Return the saddle of the squared error that fits `r` of the K classes.

    $$M = \left(1 - \frac{\mu}{\sqrt n}\right) \operatorname{diag}(1, \dots, 1, 0, \dots, 0)
    \, Y, \qquad F = r \left(\mu \sqrt n - \tfrac{\mu^2}{2}\right) + (K - r) \tfrac n2$$

    Every critical point has this form, with any projector of rank r in place of the
    diagonal one. $\sigma_{\max} = \sqrt n$.

    Args:
      objective: squared error with weight decay, without bias.
      rank: `r`, from 0, the origin, to K - 1.
      num_classes: `K`.
      per_class: `n`, samples of each class.
      dim: `d`, above r.
      dtype: floating dtype; JAX's default if None.

    Returns:
      `CriticalPoint` with multiplicity (d - r) (K - r).

    Raises:
      ValueError: an argument does not fit, or $\mu \ge \sqrt n$.

    Source: ncjax, from the singular values of the targets.

    >>> import ncjax
    >>> objective = ncjax.Objective("squared_error", weight_decay=(0.2, 0.2))
    >>> saddle = ncjax.rank_point(objective, 2, num_classes=4, per_class=3, dim=6)
    >>> round(saddle.eigenvalue, 6), saddle.multiplicity
    (-1.532051, 8)
    """
    dtype = float_dtype(dtype)
    check_integer("rank", rank, least=0)
    problem = _problem(objective, "squared_error", num_classes, per_class, dim, rank)
    if rank >= num_classes:
        raise ValueError(
            f"rank must be below num_classes = {num_classes}, got {rank}: ncjax.minimiser "
            "is the point of full rank"
        )
    if objective.weight_decay is None:
        raise ValueError("rank_point needs an objective with weight_decay, got none")
    root_n, mu = math.sqrt(per_class), problem.mu
    _check_below(mu, root_n)
    kept = (1 - mu / root_n) * np.diag(np.arange(num_classes) < rank)
    return _point(
        problem,
        kept,
        mu=mu,
        sigma_max=root_n,
        multiplicity=(dim - rank) * (num_classes - rank),
        dtype=dtype,
    )


def _problem(objective, loss: str, num_classes: int, per_class: int, dim: int, rank: int):
    """Return the balanced problem, or raise ValueError if a saddle is not known for it."""
    check_sizes(num_classes=num_classes, per_class=per_class, dim=dim)
    problem = make_problem(objective, (per_class,) * num_classes, dim)
    if objective.loss != loss or objective.bias is not None or objective.fixed_classifier:
        raise ValueError(
            f"objective must have loss={loss!r}, no bias and no fixed classifier, got "
            f"{objective}"
        )
    decay = objective.weight_decay
    if (decay is None and objective.ball is None) or (
        decay is not None and min(decay) <= 0
    ):
        raise ValueError(
            "objective must have positive weight_decay or a ball: ncjax.block_saddle is "
            "the direction without them"
        )
    if dim <= rank:
        raise ValueError(f"dim must be above {rank}, the rank of the saddle, got {dim}")
    return problem


def _margin(block_size: int, others: int, strength: float) -> float:
    """Return c with `b p_in + (K - b) p_x = mu / sqrt(n) + alpha`."""
    _check_below(strength, 1.0)
    if block_size == 1:
        return 0.0
    log_strength = math.log(strength)
    return root_above(lambda c: log_pull_within(block_size, others, c) - log_strength, 0.0)


def _check_below(strength: float, threshold: float) -> None:
    if strength >= threshold:
        raise ValueError(
            "weight_decay must be weaker for a saddle beside the origin: at this strength "
            "the origin is the minimiser"
        )


def _point(
    problem: Problem,
    logits: np.ndarray,
    *,
    mu: float,
    sigma_max: float,
    multiplicity: int,
    dtype,
) -> CriticalPoint:
    W, H = factorise(problem, logits)
    root = math.sqrt(problem.ratio)
    decay_W, decay_H = mu / root, mu * root
    per_class = int(problem.counts[0])
    params = Params(
        jnp.asarray(W, dtype), jnp.asarray(np.repeat(H[:, None], per_class, axis=1), dtype)
    )
    return CriticalPoint(
        params=params,
        value=value_of(problem, Optimum(W, H, True, "")),
        sigma_max=sigma_max,
        eigenvalue=pair(decay_W, decay_H, mu - sigma_max, mu + sigma_max)[0],
        multiplicity=multiplicity,
    )
