"""Statements on deep models, for `experiments.theorems`: a number for each."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments._statements import NCJAX, Statement, below

K, N, D, P = 4, 3, 5, 3
EARLY, LATE = 12.0, 1e4  # log t
_ON = f"p={P} K={K} n={N} d={D}"
_MARGIN = 200.0  # q of the points whose curvature is computed
_CODES = ("simplex", "pairs")


def _follow(start: ncjax.DeepParams) -> ncjax.FlowSolution:
    """Follow a start to both times; all starts share one program."""
    flow = ncjax.gradient_flow(start, np.array([EARLY, LATE]), rtol=1e-9)
    return jax.device_get(flow)


@functools.cache
def _flow() -> ncjax.FlowSolution:
    """Follow the start of sines and cosines of the theory's table; it collapses."""

    def layer(rows: int, place: int):
        i, j = np.indices((rows, D))
        return jnp.asarray(0.6 * np.sin(1 + 3 * i + 7 * j + 5 * place))

    k, i, j = np.indices((K, N, D))
    H = jnp.asarray(0.6 * np.cos(2 + 5 * k + 11 * i + 13 * j))
    return _follow(ncjax.DeepParams((layer(D, 0), layer(K, 1)), H))


def _value() -> float:
    return float(ncjax.softmax_codes(K, P - 1, N)["simplex"].value)


def _sharp_norm(_flow_of_two_factors) -> Statement:
    found = float(ncjax.squared_norm(_flow().final)) / LATE ** (2 / P)
    return below(
        NCJAX,
        "deep: |Z|²/(log t)^(2/p) tends to 2V",
        f"{_ON}, log t = {LATE:g}",
        abs(found / (2 * _value()) - 1),
        2e-3,
    )


def _sharp_loss(_flow_of_two_factors) -> Statement:
    exponent = LATE + float(_flow().log_loss[-1]) + (2 - 2 / P) * math.log(LATE)
    return below(
        NCJAX,
        "deep: t L (log t)^(2-2/p) tends to 2V/p²",
        f"{_ON}, log t = {LATE:g}",
        abs(math.exp(exponent) * P**2 / (2 * _value()) - 1),
        4e-3,
    )


def _balance(_flow_of_two_factors) -> Statement:
    return below(
        "Arora et al. 2018",
        "deep: W_(l+1)ᵀ W_(l+1) - W_l W_lᵀ and W_1ᵀ W_1 - Σ h hᵀ are conserved",
        f"{_ON}, log t = {LATE:g}",
        np.max(_flow().drift.balance),
        1e-7,
    )


def _both_stable(_flow_of_two_factors) -> Statement:
    """Collapse and pairs have no negative eigenvalue, and the transverse ones of theory."""
    error = 0.0
    for name in _CODES:
        code = ncjax.softmax_codes(4, 2, dim=4)[name]
        values = _sphere_eigenvalues(_at_margin(code, 3))
        transverse = 3 / (2 * code.value) * _MARGIN ** (1 - 2 / 3)
        error = max(error, -values.min(), np.abs(values - transverse).min())
    return below(
        "Súkeník et al. 2024",
        "deep: collapse and pairs are both minima, transverse (p/2V) q^(1-2/p) > 0",
        f"p=3 K=4 n=1 d=4, q = {_MARGIN:g}: eigenvalues on the sphere",
        error,
        1e-8,
    )


def _pairs_at_two_factors(_flow_of_two_factors) -> Statement:
    code = ncjax.softmax_codes(6, dim=4)["pairs"]
    least = _sphere_eigenvalues(_at_margin(code, 2)).min()
    sigma = 6 / (6 - 2)  # of the dual, of blocks of two
    return below(
        NCJAX,
        "two factors: pairs are a strict saddle, eigenvalue (1 - σ_max)/V",
        f"p=2 K=6 n=1 d=4, q = {_MARGIN:g}",
        abs(least - (1 - sigma) / code.value),
        1e-8,
    )


def _at_margin(code, factors: int):
    """Return the point of a code whose least margin is q."""
    scale = _MARGIN ** (1 / factors)
    return jax.tree.map(lambda leaf: scale * leaf, code.params)


def _sphere_eigenvalues(params) -> np.ndarray:
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, which="all", sphere=True)
    return np.asarray(eig.eigenvalues)


def _pairs_below_collapse(_flow_of_two_factors) -> Statement:
    """Count wrong orders of collapse and pairs, by the norms of points of margin 1."""
    wrong = 0
    for num_classes in (4, 6):
        for p in (2, 3, 4):
            codes = ncjax.softmax_codes(num_classes, p - 1)
            collapse, pairs = (
                sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(codes[name].params))
                for name in _CODES
            )
            smaller = 2 ** (2 / p) < 2 * (num_classes - 1) / num_classes
            wrong += (pairs < collapse * (1 - 1e-9)) != smaller
    return below(
        "Súkeník et al. 2024",
        "deep: pairs have a smaller norm than collapse iff 2^(2/p) < 2(K-1)/K",
        "K = 4, 6, p = 2, 3, 4: number of exceptions",
        wrong,
        0,
    )


def _hadamard(_flow_of_two_factors) -> Statement:
    r"""Compare the time of a margin with the integral of a scalar equation.

    With every factor s times a Hadamard matrix without its constant column, orthonormal,
    the flow keeps this form: $\dot s = K \sqrt n s^{p-1} / (e^m + K - 1)$ with
    $m = s^p / \sqrt n$.
    """
    first, root = 0.4, math.sqrt(N)
    signs = np.array([[1, 1], [1, -1]])
    basis = np.zeros((K, D))
    basis[:, : K - 1] = np.kron(signs, signs)[:, 1:] / math.sqrt(K)
    features = np.repeat(basis[:, None], N, axis=1) / root
    factors = (np.diag(np.arange(D) < K - 1).astype(float), basis, features)
    below_logits, classifier, H = (jnp.asarray(first * factor) for factor in factors)
    flow = _follow(ncjax.DeepParams((below_logits, classifier), H))
    early = jax.tree.map(lambda leaf: leaf[0], flow.params)
    last = float(root * jnp.min(ncjax.margins(early))) ** (1 / P)

    nodes, weights = np.polynomial.legendre.leggauss(80)
    s = (first + last) / 2 + (last - first) / 2 * nodes
    slowness = (np.exp(s**P / root) + K - 1) / (K * root * s ** (P - 1))
    time = (last - first) / 2 * np.sum(weights * slowness)
    return below(
        "arXiv 2512.04006",
        "deep: the flow of a Hadamard start solves one scalar equation",
        f"{_ON}, log t = {EARLY:g}: error of log t",
        abs(math.log(time) - EARLY),
        1e-6,
    )


def _polygon(_flow_of_two_factors) -> Statement:
    """Compare value and negative eigenvalues of the hexagon in four dimensions."""
    code = ncjax.softmax_codes(6, dim=4)["polygon"]
    turns = 1 - np.cos(2 * np.pi * np.arange(1, 6) / 6)
    value, sigma = 6 / turns[0], turns / turns[0]
    expected = np.repeat((1 - sigma[sigma > 1 + 1e-9]) / value, 2)
    found = _sphere_eigenvalues(_at_margin(code, 2))
    negative = found[found < -1e-6]
    error = math.inf
    if negative.size == expected.size:
        error = np.abs(np.sort(negative) - np.sort(expected)).max()
    return below(
        NCJAX,
        "hexagon: value K/(1 - cos 2π/K), its negative eigenvalues in d = 4",
        f"p=2 K=6 n=1 d=4, q = {_MARGIN:g}",
        max(error, abs(float(code.value) - value)),
        1e-8,
    )


def _pyramid(_flow_of_two_factors) -> Statement:
    found = ncjax.solve_separation((1,) * 5, 3, starts=8)
    return below(
        "Jiang et al. 2023",
        "d = 3, K = 5: the least norm found is the square pyramid's, 4 + 2/√5",
        f"{found.source}: error of the value",
        abs(found.value - (4 + 2 / math.sqrt(5))),
        1e-9,
    )


CHECKS: tuple[Callable[[Any], Statement], ...] = (
    *(_sharp_norm, _sharp_loss, _balance, _hadamard),
    *(_both_stable, _pairs_at_two_factors, _pairs_below_collapse),
    *(_polygon, _pyramid),
)
