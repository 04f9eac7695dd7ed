"""Spectra at minimisers, at the origin and at saddles against `hessian_eig`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ncjax
from ncjax.objectives.coupling import triple

pytestmark = pytest.mark.usefixtures("quick_compilation")

Objective = partial(ncjax.Objective, "cross_entropy")
Focal = partial(ncjax.Objective, "focal")
Squared = partial(ncjax.Objective, "squared_error")


def equal(decay):
    return Objective(weight_decay=(decay, decay))


# Objective, K, n, d, and the smallest positive eigenvalue where the theory has it.
AT_MINIMISERS = [
    (equal(0.1), 4, 3, 6, 0.1),
    (equal(0.3), 5, 2, 6, None),
    (equal(0.05), 3, 2, 2, 0.05),
    (equal(0.01), 4, 1, 3, None),
    (equal(2.0), 4, 3, 6, None),  # the minimiser is 0
    (Objective(weight_decay=(0.05, 0.2)), 4, 3, 6, None),
    (Objective(weight_decay=(0.1, 0.4), smoothing=0.1), 4, 3, 6, None),
    (Objective(ball=(8.0, 24.0)), 4, 3, 6, None),
    (Objective(ball=(6.0, 3.0), smoothing=0.1), 4, 1, 3, None),
    (Squared(weight_decay=(0.2, 0.2)), 4, 3, 6, 0.2),
    (Squared(weight_decay=(0.1, 0.9)), 4, 3, 6, None),
    (Objective(temperature=3.0), 5, 2, 6, 0.322434461004),
    (Objective(temperature=5.0), 4, 3, 6, 0.0253558698158),
]


@jax.jit
def derivatives(objective, params, weights=None):
    """Value, gradient and Hessian; one program for all numbers of an objective."""
    fn = objective if objective.ball is None else objective.on_boundary
    flat, unravel = ravel_pytree(params)

    def value(x):
        return fn(unravel(x), weights)

    return value(flat), jax.grad(value)(flat), jax.hessian(value)(flat)


def all_eigenvalues(*arguments):
    return np.linalg.eigvalsh(derivatives(*arguments)[2])


def assert_is_spectrum(found, eigenvalues):
    """Of every eigenvalue as many as the multiplicity says, to 1e-8."""
    assert (np.diff(found.eigenvalues) > 0).all()
    assert found.multiplicities.sum() == len(eigenvalues)
    repeated = np.repeat(found.eigenvalues, found.multiplicities)
    np.testing.assert_allclose(repeated, np.sort(eigenvalues), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("objective", "K", "n", "d", "slowest"), AT_MINIMISERS, ids=str)
def test_the_whole_spectrum_at_a_minimiser(objective, K, n, d, slowest):
    found = ncjax.spectrum(objective, (n,) * K, d)
    params = ncjax.minimiser(objective, (n,) * K, d).params
    assert_is_spectrum(found, all_eigenvalues(objective, params))
    if slowest is not None:
        positive = found.eigenvalues[found.eigenvalues > 0]
        assert positive[0] == pytest.approx(slowest, abs=6e-13)


@pytest.mark.parametrize(
    "objective",
    [equal(0.1), Objective(ball=(8.0, 24.0)), Squared(weight_decay=(0.2, 0.2))],
    ids=str,
)
def test_hessian_eig_finds_the_spectrum(objective):
    found = ncjax.spectrum(objective, (3,) * 4, 6)
    fn = objective if objective.ball is None else objective.on_boundary
    params = ncjax.minimiser(objective, (3,) * 4, 6).params
    eig = ncjax.hessian_eig(fn, params, which="all")
    assert_is_spectrum(found, eig.eigenvalues)


def test_the_slowest_eigenvalue_of_six_classes_with_unit_rows():
    found = ncjax.spectrum(Objective(temperature=2.0), (1,) * 6, 5)
    positive = found.eigenvalues[found.eigenvalues > 0]
    assert positive[0] == pytest.approx(0.599132142838, abs=6e-13)


def test_hessian_eig_finds_the_eigenvalues_of_a_saddle():
    objective = Objective(weight_decay=(0.2, 0.2))
    saddle = ncjax.block_point(objective, 2, 2, 3, 5)
    eig = ncjax.hessian_eig(objective, saddle.params, k=saddle.multiplicity + 1)
    np.testing.assert_allclose(eig.eigenvalues[:-1], saddle.eigenvalue, rtol=0, atol=1e-10)
    assert eig.eigenvalues[-1] > -1e-10


def test_the_sample_of_the_theory():
    found = ncjax.spectrum(equal(0.1), (3,) * 4, 6)
    expected = {
        0: 12,
        0.1: 33,
        0.2: 15,
        0.20484797136: 16,
        0.20580999764: 3,
        0.20969594272: 2,
        0.40969594272: 3,
        0.5012316841: 8,
        0.70270677101: 3,
        0.80246336821: 1,
    }
    np.testing.assert_allclose(found.eigenvalues, list(expected), rtol=0, atol=6e-11)
    np.testing.assert_array_equal(found.multiplicities, list(expected.values()))


@pytest.mark.parametrize("K", [3, 4, 7])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("extra", [0, 1, 6])
def test_multiplicities_sum_to_the_number_of_variables(K, n, extra):
    variables = (K + K * n) * (K + extra)
    for objective in (
        equal(0.1),
        Objective(ball=(3.0, 4.0)),
        Squared(weight_decay=(0.1, 0.2)),
    ):
        assert ncjax.spectrum(objective, (n,) * K, K + extra)[1].sum() == variables
    assert ncjax.spectrum(equal(0.1), (n,) * K, K - 1)[1].sum() == (K + K * n) * (K - 1)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(weight_decay=(0.1, 0.4)),
        Objective(weight_decay=(0.1, 0.4), smoothing=0.1),
        Focal(weight_decay=(0.1, 0.4), gamma=2),
        Squared(weight_decay=(0.1, 0.4)),
        Objective(),
    ],
    ids=str,
)
def test_the_spectrum_at_the_origin(objective):
    zero = ncjax.Params(jnp.zeros((4, 6)), jnp.zeros((4, 3, 6)))
    found = ncjax.spectrum(objective, (3,) * 4, 6, at="origin")
    assert_is_spectrum(found, all_eigenvalues(objective, zero))


def test_the_origin_of_the_theory_and_of_classes_of_any_size():
    objective = Objective(weight_decay=(0.1, 0.4))
    found = ncjax.spectrum(objective, (3,) * 4, 6, at="origin")
    assert found.eigenvalues[0] == pytest.approx(-1.488533865071, abs=6e-13)
    assert found.multiplicities[0] == 18
    found = ncjax.spectrum(objective, (3, 2, 1), 2, at="origin")
    zero = ncjax.Params(jnp.zeros((3, 2)), jnp.zeros((3, 3, 2)))
    weights = ncjax.sample_weights((3, 2, 1))
    assert_is_spectrum(found, all_eigenvalues(objective, zero, weights))


def test_the_separation_at_collapse_has_the_spectrum_of_the_ball():
    """On the sphere |Z| = const the direction W, -H has eigenvalue 2 mu instead of 0."""
    n, margin = 3, 2.0
    tau = 3 * math.sqrt(n) * margin
    objective = Objective(ball=(tau, tau))
    params = ncjax.minimiser(objective, (n,) * 4, 6).params
    expected = ncjax.spectrum(objective, (n,) * 4, 6)
    loss = ncjax.minimiser(objective, (n,) * 4, 6).value
    found = ncjax.hessian_eig(
        ncjax.log_cross_entropy, params, which="all", sphere=True
    ).eigenvalues
    eps = 1 / (math.exp(margin) + 3)
    mu = math.sqrt(n) * 4 * eps
    repeated = np.repeat(expected.eigenvalues, expected.multiplicities)
    zero = int(np.argmin(np.abs(repeated)))
    balance = np.sort(np.append(np.delete(repeated, (zero, zero + 1)), 2 * mu)) / loss
    np.testing.assert_allclose(np.sort(found), balance, rtol=0, atol=1e-10)


def test_the_slowest_eigenvalues_of_two_sizes_of_classes():
    """Numbers of the theory; 30 variables of left-out samples have eigenvalue 0."""
    counts, objective = (4, 4, 1, 1), equal(0.1)
    best = ncjax.minimiser(objective, counts, 5)
    found = all_eigenvalues(objective, best.params, best.weights)
    np.testing.assert_allclose(found[:39], 0, atol=1e-12)
    np.testing.assert_allclose(found[39:58], 0.1, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found[58:64], 0.1511602801, rtol=0, atol=6e-11)
    np.testing.assert_allclose(found[64:66], (0.1632178471, 0.1634785473), atol=6e-11)


# K, b, n, d, decay, c, eigenvalue, multiplicity, value.
BLOCKS = [
    (4, 2, 1, 4, (0.1, 0.1), 5.88887795833, -0.09, 2, 1.58812194677),
    (4, 2, 3, 5, (0.2, 0.2), 5.58484496228, -0.176905989232, 3, 5.29654423934),
    (6, 3, 2, 8, (0.1, 0.1), 5.72408034562, -0.0741594609468, 4, 4.07879025855),
    (6, 2, 1, 6, (0.05, 0.2), None, -0.0408955364654, 6, None),
]


def assert_is_saddle(saddle, objective):
    """Stationary, of this value, with this eigenvalue and no other negative one."""
    value, gradient, hessian = derivatives(objective, saddle.params)
    assert float(value) == pytest.approx(saddle.value, rel=1e-13)
    np.testing.assert_allclose(gradient, 0, atol=1e-13)
    found = np.linalg.eigvalsh(hessian)
    k = saddle.multiplicity
    np.testing.assert_allclose(found[:k], saddle.eigenvalue, rtol=0, atol=1e-10)
    assert found[k] > -1e-12


@pytest.mark.parametrize("row", BLOCKS, ids=str)
def test_block_points_of_the_theory_are_saddles(row):
    K, b, n, d, decay, c, eigenvalue, multiplicity, value = row
    objective = Objective(weight_decay=decay)
    saddle = ncjax.block_point(objective, K // b, b, n, d)
    assert saddle.eigenvalue == pytest.approx(eigenvalue, abs=6e-13)
    assert saddle.multiplicity == multiplicity
    if value is not None:
        assert saddle.value == pytest.approx(value, abs=6e-12)
        W, H = saddle.params
        assert float((W[0] - W[1]) @ H[0, 0]) == pytest.approx(c, abs=6e-12)
    assert_is_saddle(saddle, objective)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(weight_decay=(0.1, 0.3), smoothing=0.05),
        Objective(ball=(7.0, 9.0)),
        Objective(ball=(4.0, 3.0), smoothing=0.05),
    ],
    ids=str,
)
def test_block_points_with_smoothing_and_on_the_ball_are_saddles(objective):
    assert_is_saddle(ncjax.block_point(objective, 2, 2, 1, 4), objective)


def test_blocks_of_one_class_are_the_origin():
    objective = Objective(weight_decay=(0.1, 0.4))
    saddle = ncjax.block_point(objective, 4, 1, 3, 6)
    assert not np.asarray(saddle.params.W).any()
    assert saddle.eigenvalue == pytest.approx(-1.488533865071, abs=6e-13)
    assert saddle.multiplicity == 18


def test_without_decay_block_points_are_the_block_saddles():
    """sigma_max / mu tends to K / (K - b)."""
    objective = equal(1e-9)
    saddle = ncjax.block_point(objective, 3, 2, 2, 8)
    assert saddle.sigma_max / 1e-9 == pytest.approx(6 / 4, rel=1e-6)


@pytest.mark.parametrize(("r", "value"), [(0, 6.0), (2, 3.65282032303)])
def test_rank_points_of_the_theory_are_saddles(r, value):
    objective = Squared(weight_decay=(0.2, 0.2))
    saddle = ncjax.rank_point(objective, r, num_classes=4, per_class=3, dim=6)
    assert saddle.value == pytest.approx(value, abs=6e-12)
    assert saddle.eigenvalue == pytest.approx(-1.53205080757, abs=6e-12)
    assert saddle.multiplicity == {0: 24, 2: 8}[r]
    assert_is_saddle(saddle, objective)


def test_a_rank_point_with_unequal_decay_is_a_saddle():
    objective = Squared(weight_decay=(0.1, 0.9))
    assert_is_saddle(ncjax.rank_point(objective, 2, 4, 3, 6), objective)


@pytest.mark.parametrize(
    ("objective", "counts", "dim", "message"),
    [
        (Focal(gamma=2, weight_decay=(1, 1)), (3,) * 4, 6, "hessian_eig"),
        (Objective(weight_decay=(1, 1)), (3, 2, 1), 6, "different sizes"),
        (Objective(weight_decay=(0.1, 0.1), bias=0.0), (3,) * 4, 6, "a bias"),
        (Objective(), (3,) * 4, 6, "positive weight_decay"),
        (Objective(weight_decay=(0, 0.1)), (3,) * 4, 6, "positive weight_decay"),
        (Objective(weight_decay=(1, 1)), (3,) * 2, 6, "2 classes"),
        (Objective(weight_decay=(1, 1)), (3,) * 4, 2, "dim must be at least 3"),
        (Squared(weight_decay=(1, 1)), (3,) * 4, 3, "dim must be at least 4"),
        (Squared(ball=(1.0, 1.0)), (3,) * 4, 4, "squared error without weight decay"),
        (Objective(temperature=1.0, smoothing=0.1), (3,) * 4, 4, "at a temperature"),
        (Objective(ball=(90.0, 90.0), smoothing=0.1), (3,) * 4, 4, "holds a minimiser"),
    ],
)
def test_a_spectrum_without_closed_form_gets_one_line(objective, counts, dim, message):
    with pytest.raises(ValueError, match=message):
        ncjax.spectrum(objective, counts, dim)


def test_a_point_of_the_spectrum_has_a_name():
    with pytest.raises(ValueError, match="at must be one of minimiser, origin"):
        ncjax.spectrum(equal(0.1), (3,) * 4, 6, at="saddle")
    with pytest.raises(ValueError, match="temperature at the origin"):
        ncjax.spectrum(Objective(temperature=1.0), (3,) * 4, 6, at="origin")


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (equal(0.1), (1, 4, 3, 6), "num_blocks must be"),
        (equal(0.1), (2, 2, 3, 2), "dim must be above 2"),
        (equal(2.0), (2, 2, 3, 6), "weight_decay must be weaker"),
        (Objective(), (2, 2, 3, 6), "block_saddle"),
        (Objective(weight_decay=(0, 1)), (2, 2, 3, 6), "positive weight_decay or a ball"),
        (Objective(ball=(1.0, 1.0)), (4, 1, 3, 6), "block_size must be at least 2"),
        (Objective(ball=(99.0, 99.0), smoothing=0.1), (2, 2, 3, 6), "ball must hold no"),
        (Squared(weight_decay=(1, 1)), (2, 2, 3, 6), "loss='cross_entropy'"),
    ],
)
def test_a_block_point_that_is_not_known_gets_one_line(objective, arguments, message):
    with pytest.raises(ValueError, match=message):
        ncjax.block_point(objective, *arguments)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (Squared(weight_decay=(1, 1)), (-1, 4, 3, 6), "rank must be an integer"),
        (Squared(weight_decay=(1, 1)), (4, 4, 3, 6), "rank must be below num_classes"),
        (Squared(weight_decay=(1, 1)), (2, 4, 3, 2), "dim must be above 2"),
        (Squared(weight_decay=(2, 2)), (2, 4, 3, 6), "weight_decay must be weaker"),
        (Squared(ball=(2.0, 2.0)), (2, 4, 3, 6), "needs an objective with weight_decay"),
        (equal(0.1), (2, 4, 3, 6), "loss='squared_error'"),
    ],
)
def test_a_rank_point_that_is_not_known_gets_one_line(objective, arguments, message):
    with pytest.raises(ValueError, match=message):
        ncjax.rank_point(objective, *arguments)


@pytest.mark.parametrize("objective", [Objective, Squared])
def test_small_eigenvalues_keep_their_digits_where_the_decays_differ_by_1e12(objective):
    """The directions that move H alone have the decay of H, the slowest of all."""
    K, n, d = 4, 3, 6
    even, uneven = (
        ncjax.spectrum(objective(weight_decay=decay), (n,) * K, d)
        for decay in ((0.1, 0.1), (1e5, 1e-7))
    )
    assert uneven.eigenvalues[0] == 0
    assert uneven.multiplicities[0] == even.multiplicities[0]
    assert uneven.eigenvalues[1] == pytest.approx(1e-7, rel=1e-13)
    rank = K if objective is Squared else K - 1
    assert uneven.multiplicities[1] == (K * n - rank) * (d - rank)


def test_the_products_of_the_eigenvalues_of_a_block_do_not_depend_on_one_decay():
    """Use det(D M D) = det(M) det(D)²."""
    even, uneven = (triple(0.1, 0.7, 0.2, 0.5, r2) for r2 in (1.0, 1e6))
    assert np.prod(uneven) * 1e6 == pytest.approx(np.prod(even), rel=1e-9)
    assert uneven[0] == pytest.approx(0.8e6, rel=1e-11)


@pytest.mark.parametrize("decay", [(1e5, 1e-7), (1e-7, 1e5)])
def test_the_unstable_eigenvalue_keeps_its_digits_where_the_decays_differ(decay):
    """Use the product mu² - sigma² and the sum lambda_W + lambda_H of the eigenvalues."""
    saddle = ncjax.rank_point(Squared(weight_decay=decay), 2, 4, 3, 6)
    other = (0.01 - 3) / saddle.eigenvalue
    assert saddle.eigenvalue + other == pytest.approx(sum(decay), rel=1e-13)
    origin = ncjax.spectrum(Squared(weight_decay=decay), (3,) * 4, 6, at="origin")
    assert origin.eigenvalues[0] == pytest.approx(saddle.eigenvalue, rel=1e-13)
