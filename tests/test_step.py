"""STEP imbalance by one equation: the theory's numbers, certificates, thresholds."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import minimize

import ncjax
from ncjax.objectives.step import Group, solve_ball, solve_penalty, step_logits

pytestmark = pytest.mark.usefixtures("quick_compilation")


def decayed(K_A, K_B, n_A, n_B):
    """Groups of weight decay."""
    return Group(K_A, n_A, math.sqrt(n_A)), Group(K_B, n_B, math.sqrt(n_B))


def of_means(K_A, K_B, n_A, n_B):
    """Groups of the model on class means."""
    return Group(K_A, n_A, 1.0), Group(K_B, n_B, 1.0)


def cosines(step, first, second):
    """cos(w_B, w_B') from the formula of the theory."""
    roots = (group.scale**2 * group.size for group in (first, second))
    norm = math.hypot(*(math.sqrt(r) * x for r, x in zip(roots, step[2:4], strict=True)))
    width = math.sqrt(1 / first.size + 1 / second.size)
    K_A, K_B = first.size, second.size
    x = width * norm * K_A / (K_B * (K_A + K_B))
    beta = second.scale * step.beta
    return (x - beta / K_B) / (x + beta * (1 - 1 / K_B))


def losses_and_slopes(logits):
    """Cross entropy of each row, and the softmax minus the targets with all digits."""
    margins = np.diag(logits)[:, None] - logits
    np.fill_diagonal(margins, np.inf)
    losses = np.logaddexp(0, np.logaddexp.reduce(-margins, axis=1))
    slopes = np.exp(-margins - losses[:, None])
    return losses, slopes - np.diag(slopes.sum(axis=1))


def per_class(first, second):
    return (
        np.arange(first.size + second.size) < first.size,
        *(
            np.repeat((first[i], second[i]), (first.size, second.size)).astype(float)
            for i in (1, 2)
        ),
    )


# K_A, K_B, n_A, n_B, mu and alpha, beta, a, b.
DECAY = [
    (2, 3, 8, 2, 0.5, 3.413720096, 2.176805407, 1.613842367, 1.410158032),
    (2, 3, 8, 2, 1.3, 2.141931516, 0.3164447724, 0.8275866314, 0.7032148708),
    (2, 3, 8, 2, 1.5, 1.913039884, 0, 0.656118546, 0.5341698948),
    (1, 3, 10, 2, 0.7, 0, 1.531705449, 1.950337631, 0.8260082155),
]


@pytest.mark.parametrize("row", DECAY, ids=str)
def test_the_coefficients_of_the_theory_for_weight_decay(row):
    found = solve_penalty(math.log(row[4]), *decayed(*row[:4]))
    np.testing.assert_allclose(found[:4], row[5:], rtol=0, atol=6e-10)


def test_the_coefficients_of_the_theory_on_the_ball_of_class_means():
    groups = of_means(2, 2, 4, 1)
    log_nu, found = solve_ball(8.0, *groups)
    assert math.exp(log_nu) == pytest.approx(0.448799707742, abs=6e-13)
    expected = (3.62706692579, 1.65767203126, 1.54129631467, 1.14486983367)
    np.testing.assert_allclose(found[:4], expected, rtol=0, atol=6e-12)
    assert cosines(found, *groups) == pytest.approx(-0.0995062699, abs=6e-11)
    best = ncjax.minimiser(
        ncjax.Objective(ball=(8, 8)), (1,) * 4, 4, class_weights=(4, 4, 1, 1)
    )
    assert best.value == pytest.approx(1.50487100967, abs=6e-12)
    log_nu, found = solve_ball(8.0, *of_means(2, 2, 30, 1))
    assert math.exp(log_nu) == pytest.approx(1.06451724464, abs=6e-12)
    assert found.beta == 0


@pytest.mark.parametrize(
    ("K_A", "K_B", "product", "ratio"),
    [
        (2, 2, 4, 27.7353914),
        (5, 5, 5, 12.1924471),
        (7, 3, 5, 4.00046671),
        (3, 7, 5, 245.496931),
        (3, 7, 1, 4.13590837),
        (3, 7, 10, 6350.84646),
    ],
)
def test_from_which_ratio_on_the_minority_merges(K_A, K_B, product, ratio):
    K = K_A + K_B
    found = ncjax.minority_collapse_ratio(K_A, K_B, ball=(K * product, K))
    assert found == pytest.approx(ratio, rel=2e-9)
    objective = ncjax.Objective(ball=(K * product, K))

    def distance(R):
        weights = (R,) * K_A + (1.0,) * K_B
        W = ncjax.minimiser(objective, (1,) * K, K, class_weights=weights).params.W
        return float(np.linalg.norm(W[-1] - W[-2]))

    assert distance(found * (1 + 1e-6)) < 1e-12
    assert distance(found * (1 - 1e-6)) > 1e-5


@given(st.integers(1, 6), st.integers(2, 6), st.floats(1, 1e8), st.floats(1.001, 10))
def test_the_norm_at_the_threshold_grows_with_the_ratio(K_A, K_B, R, factor):
    """So there is one ratio from which on the minority merges."""
    small, large = (
        solve_penalty(0.0, *of_means(K_A, K_B, ratio, 1)) for ratio in (R, R * factor)
    )
    assert small.beta == large.beta == 0
    if small.norm > 0:
        assert large.norm > small.norm
        for before, after in zip(small, large, strict=True):
            assert after >= before


def test_a_huge_ball_lets_no_finite_minority_merge():
    assert ncjax.minority_collapse_ratio(2, 2, ball=(1e9, 1e9)) == math.inf


@pytest.mark.parametrize(
    ("R", "cosine"), [(2, -0.0902615), (10, -0.0202319), (100, 0.3106899)]
)
def test_cosines_of_the_minority_grow_with_the_ratio(R, cosine):
    objective = ncjax.Objective(ball=(50, 10))
    weights = (R,) * 3 + (1,) * 7
    best = ncjax.minimiser(objective, (1,) * 10, 9, class_weights=weights)
    first, second = np.asarray(best.params.W)[-2:]
    assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(second))
    assert first @ second / (first @ first) == pytest.approx(cosine, abs=6e-8)


@pytest.mark.parametrize(
    ("mu", "distance"), [(1e-2, 0.18599), (1e-8, 0.22464), (1e-16, 0.23306)]
)
def test_cosines_approach_the_separation_like_one_over_the_log_of_the_decay(mu, distance):
    groups = decayed(2, 2, 4, 1)
    cosine = cosines(solve_penalty(math.log(mu), *groups), *groups)
    assert (cosine + 0.116963119775) * -math.log(mu) == pytest.approx(distance, abs=6e-6)


def test_a_decay_far_below_the_range_of_floats_gives_the_limit():
    """mu = exp(-1e5). The limit .24223 is a perturbation of first order."""
    groups = decayed(2, 2, 4, 1)
    cosine = cosines(solve_penalty(-1e5, *groups), *groups)
    assert (cosine + 0.116963119775) * 1e5 == pytest.approx(0.24223, abs=2e-5)


@pytest.mark.parametrize("edge", [math.sqrt(2), math.sqrt(8)])
def test_a_group_merges_from_the_root_of_its_size_on(edge):
    """B has classes of 2 and A of 8 samples."""
    place = 1 if edge < 2 else 0
    below, above = (
        solve_penalty(math.log(edge + shift), *decayed(3, 2, 8, 2))
        for shift in (-1e-6, 1e-6)
    )
    assert below[place] > 0
    assert above[place] == 0


def test_groups_in_balance_have_no_coefficients_though_the_majority_is_apart():
    """(K_B n_A + K_A n_B) / K < mu^2 < n_A."""
    found = solve_penalty(math.log(9.0), *decayed(3, 7, 100, 1))
    assert found.a == found.b == found.beta == 0
    assert found.alpha > 0.1


sizes = st.integers(1, 5)
counts = st.floats(1, 1e4)


@given(sizes, sizes, counts, counts, st.floats(1e-6, 1.5), st.booleans())
def test_the_gradient_is_a_subgradient_of_the_norm(K_A, K_B, n_A, n_B, share, of_mean):
    """sigma_max(G / s) <= mu and <G, M> = -mu |M s|_*, which proves the minimum."""
    groups = (of_means if of_mean else decayed)(K_A, K_B, n_A, n_B)
    mu = share * max(group.loss / group.scale for group in groups)
    step = solve_penalty(math.log(mu), *groups)
    first, weights, scales = per_class(*groups)
    logits = step_logits(step, first)
    slopes = weights[:, None] * losses_and_slopes(logits)[1]
    norm = np.linalg.norm(scales[:, None] * logits, "nuc")
    assert step.norm == pytest.approx(norm, rel=1e-12, abs=1e-12)
    assert np.linalg.norm(slopes / scales[:, None], 2) <= mu * (1 + 1e-10)
    assert -np.sum(slopes * logits) == pytest.approx(mu * norm, rel=1e-9, abs=1e-9)


@given(sizes, sizes, counts, counts, st.floats(0.01, 100))
def test_the_ball_is_filled(K_A, K_B, n_A, n_B, tau):
    log_nu, found = solve_ball(tau, *of_means(K_A, K_B, n_A, n_B))
    assert found.norm == pytest.approx(tau, rel=1e-11)
    assert found == solve_penalty(log_nu, *of_means(K_A, K_B, n_A, n_B))


@given(sizes, sizes, st.floats(1, 100), st.floats(1, 100), st.floats(0.01, 1.2))
@settings(max_examples=10)
def test_no_search_over_the_four_coefficients_finds_less(K_A, K_B, n_A, n_B, share):
    groups = decayed(K_A, K_B, n_A, n_B)
    mu = share * math.sqrt(max(n_A, n_B))
    first, weights, scales = per_class(*groups)

    def value(coefficients):
        step = solve_penalty(0.0, *groups)._replace(
            **dict(zip(("alpha", "beta", "a", "b"), coefficients, strict=True))
        )
        logits = step_logits(step, first)
        norm = np.linalg.norm(scales[:, None] * logits, "nuc")
        return weights @ losses_and_slopes(logits)[0] + mu * norm

    found = solve_penalty(math.log(mu), *groups)[:4]
    search = minimize(value, np.full(4, 0.5), bounds=[(0, None)] * 4, method="L-BFGS-B")
    assert value(found) <= search.fun * (1 + 1e-12)
    assert value(found) == pytest.approx(search.fun, rel=1e-4)


@pytest.mark.parametrize("tau", [1e-54, 1e-8])
def test_from_which_ratio_on_the_minority_merges_on_a_tiny_ball(tau):
    ratio = ncjax.minority_collapse_ratio(1, 2, (tau, tau))
    assert ratio == pytest.approx(1, abs=2 * tau + 1e-12)


def test_the_ratio_grows_exponentially_with_the_ball_up_to_the_range_of_floats():
    """log R0 grows by the same amount with each step of the radius."""
    logs = [
        math.log(ncjax.minority_collapse_ratio(3, 7, (tau, tau)))
        for tau in (1000.0, 1250.0, 1500.0, 1750.0)
    ]
    np.testing.assert_allclose(np.diff(logs), np.diff(logs)[0], rtol=1e-3)
    assert ncjax.minority_collapse_ratio(3, 7, (3000.0, 3000.0)) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, (1, 1)), "num_majority must be"),
        ((2, 1, (1, 1)), "num_minority must be"),
        ((2, 2, (1, 0)), "ball must be positive and finite, got 0"),
        ((2, 2, (math.inf, 1)), "ball must be positive and finite, got inf"),
        ((2, 2, 3.0), "ball must be a pair of numbers"),
        ((2, 2, "ab"), "ball must be a pair of numbers"),
        ((2, 2, None), "ball must be a pair of numbers"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        ncjax.minority_collapse_ratio(*arguments)
