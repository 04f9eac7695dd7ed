"""KKT residuals, margin ratio and certificate of several layers; collapse with decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from strategies import random_params, separating

import ncjax
from ncjax.peeled import deep_separation, margin_bound, search, separation
from ncjax.peeled.margin_bound import attainable_value, collapse_value

pytestmark = pytest.mark.usefixtures("quick_compilation")


def balanced(matrix, degree, dim, per_class=1, margin=1.0):
    """The point of least norm with the logits `margin * matrix` for every sample."""
    logits = margin * np.repeat(matrix, per_class, axis=1)
    left, sigma, right = np.linalg.svd(logits, full_matrices=False)
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    root = sigma[:rank] ** (1 / degree)
    beyond = (0, dim - rank)
    W = np.pad(left[:, :rank] * root, ((0, 0), beyond))
    rows = np.pad(right[:rank].T * root, ((0, 0), beyond))
    middle = np.diag(np.pad(root, beyond))
    H = rows.reshape(len(matrix), per_class, dim)
    layers = (*(middle,) * (degree - 2), W)
    return ncjax.DeepParams(tuple(map(jnp.asarray, layers)), jnp.asarray(H))


def collapse(size):
    return np.eye(size) - 1 / size


def pairs(size):
    return np.kron(np.eye(size // 2), [[1.0, -1], [-1, 1]])


def verdict(proof):
    return int(proof.verdict)


def deep_separating(seed, layers, num_classes=3, per_class=2, dim=4):
    """A point with positive margins and layers near the identity."""
    two = separating(seed, num_classes, per_class, dim)
    rng = np.random.default_rng(seed)
    middle = [
        jnp.asarray(np.eye(dim) + 0.1 * rng.normal(size=(dim, dim)))
        for _ in range(layers - 1)
    ]
    return ncjax.DeepParams((*middle, two.W), two.H)


# Residuals of the KKT conditions.


def gradients_of_margins(params):
    """Gradients (K, n, K, ...) of all margins in all factors, 0 for j = k."""

    def finite(point):
        found = ncjax.margins(point)
        return jnp.where(jnp.isfinite(found), found, 0)

    return jax.tree.leaves(jax.jit(jax.jacrev(finite))(params))


def test_residuals_agree_with_the_definition():
    params = deep_separating(0, 3)
    scale = float(ncjax.margins(params).min()) ** (1 / params.degree)
    scaled = jax.tree.map(lambda leaf: leaf / scale, params)
    gradients = gradients_of_margins(scaled)
    margins = np.asarray(ncjax.margins(scaled))
    others = np.isfinite(margins)
    for multipliers in ("softmax", "nnls"):
        found = ncjax.kkt(params, multipliers=multipliers)
        weights = np.asarray(found.multipliers)
        assert (weights >= 0).all()
        rest = [
            np.asarray(leaf) - np.tensordot(weights, np.asarray(slopes), axes=3)
            for leaf, slopes in zip(jax.tree.leaves(scaled), gradients, strict=True)
        ]
        tangent = np.sqrt(sum((leaf**2).sum() for leaf in rest))
        tangent /= float(ncjax.squared_norm(scaled)) ** 0.5
        np.testing.assert_allclose(found.stationarity, tangent, rtol=1e-9)
        pull = weights[others] * margins[others]
        slack = (pull - weights[others]).sum() / pull.sum()
        np.testing.assert_allclose(found.complementarity, slack, rtol=1e-9, atol=1e-12)
        if multipliers == "softmax":
            angle = ncjax.kkt_angle(params)
            np.testing.assert_allclose(found.stationarity, angle, rtol=1e-9)
            assert float(found.beta**2 + angle**2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("multipliers", ["softmax", "nnls"])
def test_one_layer_has_the_numbers_of_two_factors(multipliers):
    two = separating(1, num_classes=4)
    weights = ncjax.sample_weights((2, 1, 2, 2))
    deep = ncjax.DeepParams((two.W,), two.H)
    found = ncjax.kkt(deep, weights, multipliers=multipliers)
    expected = ncjax.kkt(two, weights, multipliers=multipliers)
    for got, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-14)
    for function in (ncjax.kkt_angle, ncjax.margin_ratio):
        np.testing.assert_allclose(
            function(deep, weights), function(two, weights), rtol=1e-12
        )


@pytest.mark.parametrize("exponent", [-250, 250])
def test_residuals_do_not_depend_on_the_scale_of_a_factor(exponent):
    """Least-squares multipliers depend on the direction, at products beyond the range."""
    params = deep_separating(2, 2)
    far = jax.tree.map(lambda leaf: leaf * 2.0**exponent, params)
    for found, expected in (
        (ncjax.kkt(far, multipliers="nnls"), ncjax.kkt(params, multipliers="nnls")),
        (ncjax.margin_ratio(far), ncjax.margin_ratio(params)),
    ):
        chosen = getattr(found, "stationarity", found)
        right = getattr(expected, "stationarity", expected)
        np.testing.assert_allclose(chosen, right, rtol=1e-9)


@pytest.mark.parametrize("function", [ncjax.kkt, ncjax.certificate])
def test_bad_input_is_named(function):
    good = deep_separating(0, 2)
    with pytest.raises(ValueError, match="every margin must be positive, got q_min = -"):
        function(good._replace(H=-good.H))
    with pytest.raises(ValueError, match="W_2 must be finite"):
        function(good._replace(layers=(good.layers[0], jnp.nan * good.W)))
    with pytest.raises(ValueError, match=r"multipliers must be one of .* got 'best'"):
        function(good, multipliers="best")
    with pytest.raises(ValueError, match="tol must not be negative, got -1"):
        ncjax.certificate(good, tol=-1)
    objective = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))
    with pytest.raises(ValueError, match=r"ncjax.Params alone, got ncjax.DeepParams"):
        ncjax.certificate(good, objective)


# The certificate.


@pytest.mark.parametrize(("degree", "per_class"), [(3, 1), (4, 2)])
def test_values_of_collapse_and_of_the_pairs(degree, per_class):
    unit = degree / 2 * per_class ** (1 / degree)
    values = {"collapse": 5 * unit, "pairs": 3 * 2 ** (2 / degree) * unit}
    for matrix, name in ((collapse(6), "collapse"), (pairs(6), "pairs")):
        params = balanced(matrix, degree, 6, per_class, margin=2e4)
        proof = ncjax.certificate(params)
        assert float(proof.value) == pytest.approx(values[name], rel=1e-12)
        assert float(proof.schatten) == pytest.approx(values[name], rel=1e-12)
        assert float(proof.imbalance) == pytest.approx(0, abs=1e-12)
        bound = degree / 2 * (5 * per_class**0.5) ** (2 / degree)
        assert float(proof.bound) == pytest.approx(bound, rel=1e-14)
        assert float(proof.gap) == pytest.approx(values[name] / bound - 1, rel=1e-12)
        excess = values[name] / values["collapse"] - 1
        assert float(proof.excess) == pytest.approx(excess, rel=1e-12, abs=1e-12)
        assert float(proof.residual) < 1e-10  # margins round at 2e4 eps
        # The pairs have a smaller norm, and no test decides whether any norm is smaller.
        expected = "NOT_OPTIMAL" if name == "collapse" else "UNDECIDED"
        assert verdict(proof) == getattr(deep_separation, expected)
        ratio = values["collapse"] / values[name]
        assert float(ncjax.margin_ratio(params)) == pytest.approx(ratio, rel=1e-12)


def test_the_value_exceeds_the_schatten_value_away_from_balance():
    params = balanced(collapse(4), 3, 5, margin=50.0)
    tilted = params._replace(layers=(2 * params.layers[0], params.layers[1] / 2))
    proof = ncjax.certificate(tilted)
    assert float(proof.schatten) == pytest.approx(4.5, rel=1e-12)
    assert float(proof.imbalance) == pytest.approx((4 + 1 / 4 + 1) / 3 - 1, rel=1e-12)
    assert verdict(proof) == deep_separation.NOT_KKT


def test_two_classes_are_certified():
    """The logits of every KKT direction have one rank then, and the bound is attained."""
    proof = ncjax.certificate(balanced(collapse(2), 4, 2, per_class=3, margin=100.0))
    assert float(proof.gap) == pytest.approx(0, abs=1e-12)
    assert verdict(proof) == deep_separation.GLOBAL_OPTIMUM


@pytest.mark.parametrize("matrix", [collapse(4), pairs(4)], ids=["collapse", "pairs"])
def test_the_test_of_sigma_max_decides_for_one_layer(matrix):
    deep = balanced(matrix, 2, 5, margin=900.0)
    expected = verdict(ncjax.certificate(ncjax.Params(deep.W, deep.H)))
    found = verdict(ncjax.certificate(deep))
    if expected == separation.GLOBAL_OPTIMUM:
        assert found == deep_separation.GLOBAL_OPTIMUM
    else:
        assert expected == separation.STRICT_SADDLE
        assert found == deep_separation.NOT_OPTIMAL


def test_unequal_classes_and_points_under_vmap():
    counts = (9, 2, 1)
    weights = ncjax.sample_weights(counts)
    roots = np.sqrt(counts)
    # SELI: all margins are 1, so the logits of the class means are P.
    sigma = np.linalg.svd(collapse(3) * roots, compute_uv=False)[:2]
    left, _, right = np.linalg.svd(collapse(3) * roots)
    factor = sigma ** (1 / 3) * 30
    H = np.zeros((3, 9, 2))
    for k, count in enumerate(counts):
        H[k, :count] = right[:2, k] * factor / roots[k]
    layers = tuple(jnp.asarray(x) for x in (np.diag(factor), left[:, :2] * factor))
    params = ncjax.DeepParams(layers, jnp.asarray(H))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    both = both._replace(H=both.H.at[1].multiply(-1.0))
    # Softmax weights of unequal classes tend to the multipliers only where margins differ.
    certify = functools.partial(ncjax.certificate, multipliers="nnls")
    proof = jax.vmap(lambda z: certify(z, weights=weights))(both)
    value = 1.5 * (sigma ** (2 / 3)).sum()
    assert float(proof.value[0]) == pytest.approx(value, rel=1e-12)
    assert float(proof.excess[0]) == pytest.approx(0, abs=1e-12)
    bound = 1.5 * ncjax.separation_value(counts) ** (2 / 3)
    assert float(proof.bound[0]) == pytest.approx(bound, rel=1e-12)
    expected = [deep_separation.UNDECIDED, deep_separation.NOT_SEPARATED]
    assert proof.verdict.tolist() == expected
    assert float(ncjax.margin_ratio(params, weights)) == pytest.approx(1, abs=1e-12)


# Curvature: section "deep" of the theory.

TRANSVERSE = {"collapse": 1.94934515881, "pairs": 1.84201574932}


@pytest.mark.parametrize("name", TRANSVERSE)
def test_collapse_and_pairs_are_both_stable_for_three_factors(name):
    """For two factors the pairs have a direction of descent."""
    matrix = {"collapse": collapse, "pairs": pairs}[name](4)
    params = balanced(matrix, 3, 4, margin=200.0)
    transverse = float(ncjax.certificate(params).transverse)
    assert transverse == pytest.approx(TRANSVERSE[name], rel=1e-11)
    eigenvalues = np.asarray(
        ncjax.hessian_eig(
            ncjax.log_cross_entropy, params, k=47, sphere=True, method="dense"
        ).eigenvalues
    )
    assert eigenvalues.min() > -1e-12
    rank = {"collapse": 3, "pairs": 2}[name]
    # Orthogonal to all rows and columns in W_2, in W_1 and in H; the rows of W_2 that move
    # together change no margin either.
    copies = 3 * (4 - rank) ** 2 + rank
    assert (np.abs(eigenvalues - transverse) < 1e-9).sum() == copies
    # Beside the rows of one factor alone lie rotations and their opposites.
    assert (np.abs(eigenvalues / transverse - 2) < 1e-9).sum() >= 2 * rank * (4 - rank)


def test_for_two_factors_the_pairs_are_a_saddle():
    two = balanced(pairs(4), 2, 4, margin=200.0)
    found = ncjax.hessian_eig(ncjax.log_cross_entropy, two, sphere=True)
    assert float(found.eigenvalues[0]) == pytest.approx(-1 / 4, rel=1e-9)


def test_one_layer_without_room_is_undecided():
    """The hexagon is the best point known in the plane."""
    W, H = ncjax.solve_separation((1,) * 6, 2).params
    found = ncjax.certificate(ncjax.DeepParams((W,), H), multipliers="nnls")
    assert int(found.verdict) == deep_separation.UNDECIDED


# The margin ratio.


@pytest.mark.parametrize(
    ("num_classes", "dim", "value"),
    [(5, 2, 7.2360679775), (6, 2, 12.0), (5, 3, 4 + 2 / 5**0.5), (7, 3, 8.84044819)],
)
def test_the_margin_ratio_divides_by_the_attainable_norm(num_classes, dim, value):
    """Also where JAX traces the function: the norm is a constant of the program."""
    found = attainable_value(num_classes, 3, dim)
    assert found == pytest.approx(value * 3**0.5, rel=1e-9)
    other = random_params(0, num_classes, 3, dim, 1.0)
    norm = float(ncjax.squared_norm(other))
    expected = 2 * found * float(ncjax.margins(other).min()) / norm
    ratio = jax.jit(ncjax.margin_ratio)(other)
    assert float(ratio) == pytest.approx(expected, rel=1e-12)


def test_the_attainable_norm_in_closed_form_is_what_a_search_finds():
    found = ncjax.solve_separation((1,) * 6, 4, starts=4)
    assert attainable_value(6, 1, 4) == pytest.approx(found.value, rel=1e-9)
    assert attainable_value(100, 1, 70) is not None


def test_no_search_ends_below_the_attainable_norm():
    for num_classes, dim in margin_bound.VALUES_FOUND:
        found = search.search((1,) * num_classes, dim, 2, starts=2, seed=5)
        least = found.spread[0][0]
        assert least > attainable_value(num_classes, 1, dim) * (1 - 1e-9)


def test_two_opposite_simplices_and_an_apex_have_the_attainable_norm():
    """At (11, 5) most searches from random starts end above it."""
    simplex = np.eye(5) - 1 / 5  # of rank 4
    rows = np.zeros((11, 6))
    rows[:5, :5], rows[5:10, :5] = simplex, -simplex
    rows[:5, 5], rows[5:10, 5], rows[10, 5] = -0.5, 0.25, 1.1
    found = search.search((1,) * 11, 5, 2, starts=1, seed=0, codes=(rows @ rows.T,))
    assert found.spread[0][0] == pytest.approx(attainable_value(11, 1, 5), rel=1e-12)


def test_the_margin_ratio_of_the_polygon_is_one():
    best = ncjax.solve_separation((3,) * 7, 2).params
    assert float(ncjax.margin_ratio(best)) == pytest.approx(1, rel=1e-12)


def test_the_margin_ratio_takes_the_value_from_the_caller():
    params = balanced(pairs(6), 3, 3, margin=7.0)
    value = 1.5 * 3 * 2 ** (2 / 3)
    for given in (value, jnp.asarray(value), np.float64(value)):
        ratio = ncjax.margin_ratio(params, value=given)
        assert float(ratio) == pytest.approx(1, rel=1e-12)
    misclassified = params._replace(H=-params.H)
    assert float(ncjax.margin_ratio(misclassified, value=value)) < 0
    with pytest.raises(ValueError, match="value must be positive and finite, got -1"):
        ncjax.margin_ratio(params, value=-1)


@pytest.mark.parametrize(
    ("params", "weights", "message"),
    [
        (balanced(pairs(6), 3, 3), None, "the least width is 3, below K - 1 = 5: collapse"),
        (random_params(0, 5, 2, 3, 1.0), (1.0,) * 5, "dim is 3, below .* with weights no"),
        (random_params(0, 13, 1, 3, 1.0), None, "known for K above 12 and 2 < d < K/2; p"),
        (random_params(0, 3, 1, 1, 1.0), None, "no point separates three classes in one"),
    ],
)
def test_a_norm_that_is_not_known_is_asked_for(params, weights, message):
    weights = None if weights is None else jnp.asarray(weights)
    with pytest.raises(ValueError, match=message):
        ncjax.margin_ratio(params, weights)


def test_the_value_of_collapse_for_two_factors_is_the_separation_value():
    two = balanced(collapse(4), 2, 4, per_class=30)
    weights = ncjax.sample_weights((30, 7, 1, 1))
    expected = ncjax.separation_value((30, 7, 1, 1))
    assert float(collapse_value(two, weights)) == pytest.approx(expected, rel=1e-13)
    assert collapse_value(two, None) == pytest.approx(3 * 30**0.5, rel=1e-15)


# Collapse with weight decay.

DECAYED = {
    (3, 2, 4, 0.03): (6.0175075010, 0.379221523000),
    (4, 2, 3, 0.05): (5.3922134818, 0.980213163892),
}


def decayed_loss(decay):
    return lambda z: ncjax.cross_entropy(z) + decay / 2 * ncjax.squared_norm(z)


@pytest.mark.parametrize("setting", DECAYED, ids=str)
def test_the_decayed_collapse_is_critical_in_all_directions(setting):
    num_classes, per_class, degree, decay = setting
    found = ncjax.decayed_collapse(
        num_classes, per_class, degree - 1, decay, dim=num_classes + 1
    )
    margin, value = DECAYED[setting]
    assert found.minimum.margin == pytest.approx(margin, rel=1e-10)
    assert found.minimum.value == pytest.approx(value, rel=1e-11)
    assert found.below_origin
    assert found.barrier.value > found.origin
    assert found.origin == pytest.approx(num_classes * per_class * np.log(num_classes))
    for point in (found.minimum, found.barrier):
        assert point.params.degree == degree
        loss, gradient = jax.value_and_grad(decayed_loss(decay))(point.params)
        assert float(loss) == pytest.approx(point.value, rel=1e-13)
        for leaf in jax.tree.leaves(gradient):
            assert np.abs(leaf).max() < 1e-14
        margins = np.asarray(ncjax.margins(point.params))
        np.testing.assert_allclose(
            margins[np.isfinite(margins)], point.margin, rtol=1e-11, atol=1e-16
        )


def test_the_transition_of_the_decayed_collapse_is_of_first_order():
    known = ncjax.decayed_collapse(4, 3, 2, 0.1)
    assert 0 < known.transition < known.threshold
    at = ncjax.decayed_collapse(4, 3, 2, known.transition)
    assert at.minimum.value == pytest.approx(at.origin, rel=1e-13)
    assert at.minimum.margin > 1
    between = (known.transition + known.threshold) / 2
    above = ncjax.decayed_collapse(4, 3, 2, between)
    assert above.minimum.value > above.origin
    assert not above.below_origin
    gone = ncjax.decayed_collapse(4, 3, 2, 1.0001 * known.threshold)
    assert gone.minimum is None
    assert gone.barrier is None
    assert not gone.below_origin
    # The largest decay on a grid of margins, by the equation.
    m = np.linspace(1e-3, 5, 20001)
    decay = 4 * 3**0.5 / (np.exp(m) + 3) * (3**0.5 * m) ** (1 / 3)
    assert known.threshold == pytest.approx(decay.max(), rel=1e-7)


def test_the_decayed_collapse_of_one_layer_is_the_minimiser():
    objective = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))
    best = ncjax.minimiser(objective, counts=(3,) * 4, dim=6)
    found = ncjax.decayed_collapse(4, 3, 1, 0.1, dim=6)
    assert found.barrier is None
    assert found.threshold == found.transition == pytest.approx(3**0.5)
    assert found.minimum.margin == pytest.approx(best.margin, rel=1e-13)
    assert found.minimum.value == pytest.approx(best.value, rel=1e-13)


def test_descent_from_near_the_pairs_ends_above_the_decayed_collapse():
    """Both are local minima; collapse has the smaller value for four classes."""
    start = balanced(pairs(4), 3, 4, per_class=2, margin=5.0)
    flat, unravel = ravel_pytree(start)
    noise = 0.01 * np.random.default_rng(0).normal(size=flat.size)
    both = jax.jit(jax.value_and_grad(lambda x: decayed_loss(0.05)(unravel(x))))
    found = minimize(both, np.asarray(flat) + noise, jac=True, method="L-BFGS-B", tol=1e-13)
    assert found.fun == pytest.approx(0.984173, abs=1e-6)
    assert found.fun > ncjax.decayed_collapse(4, 2, 2, 0.05).minimum.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"weight_decay": 0.0}, "weight_decay must be positive and finite, got 0"),
        ({"dim": 2}, "dim must be at least num_classes - 1 = 3 to hold a collapse, got 2"),
        ({"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
    ],
)
def test_bad_settings_of_the_decayed_collapse_are_named(change, message):
    good = {"num_classes": 4, "per_class": 2, "depth": 2, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=message):
        ncjax.decayed_collapse(**(good | change))


def test_the_barrier_of_a_tiny_decay_is_near_the_origin():
    """Its margin is about λ³ here, no positive number."""
    found = ncjax.decayed_collapse(4, 2, depth=2, weight_decay=1e-150)
    assert found.barrier.margin == 0
    assert found.barrier.value == pytest.approx(found.origin, rel=1e-15)
    assert found.minimum.margin == pytest.approx(349.1880266, rel=1e-9)
