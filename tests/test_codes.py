"""Softmax codes, the search for the least norm at any dim and depth, and the polygon."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, nnls

import ncjax
from ncjax.peeled import search
from ncjax.peeled.codes import code_matrices

pytestmark = pytest.mark.usefixtures("quick_compilation")


def factors_of(params):
    """All factors as NumPy arrays, from the classifier to the features (d_0, N)."""
    layers = params.layers if isinstance(params, ncjax.DeepParams) else (params.W,)
    H = np.asarray(params.H)
    return [np.asarray(W) for W in layers[::-1]] + [H.reshape(-1, H.shape[-1]).T]


def product(factors, rows):
    out = np.eye(rows)
    for factor in factors:
        out = out @ factor
    return out


def slopes_of(params, dual):
    """Gradient in all factors of `<dual, logits>`, dual (K, N)."""
    factors = factors_of(params)
    parts = []
    for number, factor in enumerate(factors):
        left = product(factors[:number], len(dual))
        right = product(factors[number + 1 :], factor.shape[1])
        parts.append((left.T @ dual @ right.T).ravel())
    return np.concatenate(parts)


def dual_of(multipliers):
    """`Σ λ_kij (e_k - e_j) e_kiᵀ`, (K, N), by loops."""
    K, n, _ = multipliers.shape
    dual = np.zeros((K, K, n))
    for k, i, j in np.ndindex(multipliers.shape):
        dual[k, k, i] += multipliers[k, i, j]
        dual[j, k, i] -= multipliers[k, i, j]
    return dual.reshape(K, -1)


def point_of(params):
    return np.concatenate([factor.ravel() for factor in factors_of(params)])


def fitted_multipliers(params):
    """Multipliers >= 0 of the margins that are 1, and how far they miss the point."""
    margins = np.asarray(ncjax.margins(params))
    active = np.argwhere(margins < 1 + 1e-9)
    columns = []
    for k, i, j in active:
        one = np.zeros(margins.shape)
        one[k, i, j] = 1
        columns.append(slopes_of(params, dual_of(one)))
    return nnls(np.array(columns).T, point_of(params), maxiter=10**4)


# Codes in closed form


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [2, 4, 5, 6])
def test_every_code_satisfies_the_kkt_conditions(num_classes, depth):
    for name, code in ncjax.softmax_codes(num_classes, depth, 2).items():
        least = float(ncjax.margins(code.params).min())
        assert least == pytest.approx(1, abs=1e-13), name
        multipliers, missed = fitted_multipliers(code.params)
        assert missed < 1e-12, name
        assert multipliers.sum() == pytest.approx(2 * code.value / (depth + 1)), name
        half = float(ncjax.squared_norm(code.params)) / 2
        assert half == pytest.approx(code.value, rel=1e-13), name
        for balance in jax.tree.leaves(ncjax.balance(code.params)):
            np.testing.assert_allclose(balance, 0, atol=1e-12)


def closed_value(num_classes, blocks, apexes, degree):
    """`V / (p/2)` of blocks and apexes at one sample a class."""
    power = 2 / degree
    value = sum((b - 1) * (b / (b - 1)) ** power for b in blocks)
    if apexes:
        value += apexes - 1 + (1 - apexes / num_classes) ** (power / 2)
    return value


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_the_values_of_the_codes(degree):
    per_class = 3
    scale = degree / 2 * per_class ** (1 / degree)
    expected = {
        "simplex": 6,
        "polygon": 2 * (7 / 2 / (1 - np.cos(2 * np.pi / 7))) ** (2 / degree),
        "simplices 5+2": closed_value(7, (5, 2), 0, degree),
        "simplices 4+3": closed_value(7, (4, 3), 0, degree),
        "simplices 3+2+2": closed_value(7, (3, 2, 2), 0, degree),
        "simplices 4+2 + apex": closed_value(7, (4, 2), 1, degree),
        "simplices 3+3 + apex": closed_value(7, (3, 3), 1, degree),
        "pairs + apex": closed_value(7, (2, 2, 2), 1, degree),
        "simplices 3+2 + 2 apexes": closed_value(7, (3, 2), 2, degree),
        "pairs + 3 apexes": closed_value(7, (2, 2), 3, degree),
    }
    codes = ncjax.softmax_codes(7, degree - 1, per_class)
    assert {name: code.value / scale for name, code in codes.items()} == pytest.approx(
        expected, rel=1e-13
    )
    ranks = [6, 2, 5, 5, 4, 5, 5, 4, 5, 5]
    assert [code.rank for code in codes.values()] == ranks


def test_codes_that_do_not_fit_are_left_out_and_others_get_the_width():
    codes = ncjax.softmax_codes(6, 2, dim=3)
    assert set(codes) == {"pairs", "polygon"}
    assert codes["polygon"].params.layers[0].shape == (3, 3)
    assert ncjax.softmax_codes(6, 2)["polygon"].params.layers[0].shape == (2, 2)


def test_many_classes_have_blocks_of_one_size():
    names = [name for name, _ in code_matrices(12)]
    assert {"simplex", "pairs", "simplices 4+4+4", "pairs + 2 apexes"} <= set(names)
    assert "simplices 8+4" not in names


@pytest.mark.parametrize("degree", [2, 3])
def test_only_codes_without_larger_blocks_are_minima(degree):
    """Points near a code, at dim = rank, come back to it or end below."""
    ends = {}
    for name, matrix in code_matrices(5):
        rank = np.linalg.matrix_rank(matrix)
        code = ncjax.softmax_codes(5, degree - 1)[name]
        found = search.search((1,) * 5, rank, degree, 2, 0, (matrix,) * 2)
        ends[name] = found.spread[0][0] - code.value
    assert ends.pop("simplices 3+2") < -0.1
    assert ends == pytest.approx(dict.fromkeys(ends, 0), abs=1e-9)


def test_one_more_dimension_makes_a_code_a_saddle_at_two_factors_alone():
    matrix = dict(code_matrices(5))["pairs + apex"]
    for degree, stays in ((2, False), (3, True)):
        value = ncjax.softmax_codes(5, degree - 1)["pairs + apex"].value
        found = search.search((1,) * 5, 4, degree, 2, 0, (matrix,) * 2)
        assert (abs(found.spread[0][0] - value) < 1e-9) == stays


# The search

# V/(p/2) of the minima by SLSQP from many starts, at one sample a class: K, d, p.
MINIMA = {
    (5, 3, 2): [4.894427191],
    (6, 3, 2): [6.0],
    (7, 3, 2): [8.840448188, 9.236067977],  # the second is the pentagonal bipyramid
    (4, 3, 3): [3.0, 3.174802104],
    (5, 4, 3): [4.0, 4.103119871, 4.713517140],
    (6, 5, 3): [4.762203156, 5.0, 5.048382569, 6.603854498],
    (4, 3, 4): [2.828427125, 3.0],
    (5, 4, 4): [3.774168734, 3.804226065, 4.0],
    (3, 2, 6): [2.0],
}


@pytest.mark.parametrize("case", MINIMA, ids=str)
def test_the_search_finds_the_minima(case):
    num_classes, dim, degree = case
    found = ncjax.solve_separation((1,) * num_classes, dim, depth=degree - 1, starts=8)
    assert not found.proved
    assert found.source == "search over 8 starts"
    values = [value / (degree / 2) for value, _ in found.spread]
    assert found.value == pytest.approx(found.spread[0][0], rel=1e-12)
    assert values[0] == pytest.approx(MINIMA[case][0], abs=2e-9)
    for value in values:
        assert min(abs(value - known) for known in MINIMA[case]) < 1e-8
    assert sum(times for _, times in found.spread) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("case", MINIMA, ids=str)
def test_forty_starts_find_every_minimum(case):
    num_classes, dim, degree = case
    found = ncjax.solve_separation((1,) * num_classes, dim, depth=degree - 1)
    values = [value / (degree / 2) for value, _ in found.spread]
    assert values == pytest.approx(MINIMA[case], abs=1e-8)


SETTINGS = [
    ((1,) * 6, 3, 1),
    ((3,) * 5, 3, 1),
    ((5, 3, 2, 1), 2, 1),
    ((3,) * 4, 4, 2),
    ((2, 1, 1), 3, 2),
    ((4, 1, 1, 1), 3, 3),
    ((2, 1), 2, 2),
    ((2,) * 5, 2, 2),
    ((1,) * 5, 3, 2),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_solutions_are_feasible_and_stationary(setting):
    """By the definitions, in all factors and sample by sample."""
    counts, dim, depth = setting
    found = ncjax.solve_separation(counts, dim, depth=depth, starts=4)
    degree = depth + 1
    margins = np.asarray(ncjax.margins(found.params, found.weights))
    assert margins.min() == pytest.approx(1, abs=1e-12)
    multipliers = np.asarray(found.multipliers)
    assert multipliers.min() >= 0
    gradient = slopes_of(found.params, dual_of(multipliers))
    np.testing.assert_allclose(gradient, point_of(found.params), atol=1e-11)
    slack = np.where(multipliers > 0, margins - 1, 0)
    assert np.abs(slack).max() < 1e-6
    assert multipliers.sum() == pytest.approx(2 * found.value / degree, rel=1e-11)
    half = float(ncjax.squared_norm(found.params)) / 2
    assert half == pytest.approx(found.value, rel=1e-12)
    bound = degree / 2 * ncjax.separation_value(counts) ** (2 / degree)
    assert found.value >= bound * (1 - 1e-12)
    assert found.proved == (found.value <= bound * (1 + 1e-9))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_samples_of_a_class_factor_out(depth):
    one, many = (
        ncjax.solve_separation((n,) * 5, 3, depth=depth, starts=6).value for n in (1, 3)
    )
    assert many == pytest.approx(3 ** (1 / (depth + 1)) * one, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "dim"),
    [((3, 2, 1), 2), pytest.param((2, 2, 1, 1), 3, marks=pytest.mark.slow)],
)
def test_three_factors_of_all_samples_have_the_same_least_norm(counts, dim):
    """SLSQP over W_2, W_1 and the features of every sample, with numerical slopes."""
    K, N = len(counts), sum(counts)
    own = np.repeat(np.arange(K), counts)
    shapes = [(K, dim), (dim, dim), (dim, N)]
    splits = np.cumsum([np.prod(shape) for shape in shapes])

    def factors(x):
        parts = np.split(x, splits[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def slack(x):
        logits = product(factors(x), K)
        differences = logits[own, np.arange(N)] - logits
        return differences[own[None] != np.arange(K)[:, None]] - 1

    best, rng = np.inf, np.random.default_rng(0)
    for _ in range(4):
        start = 0.7 * rng.normal(size=splits[-1])
        end = minimize(
            lambda x: x @ x / 2,
            start,
            method="SLSQP",
            constraints={"type": "ineq", "fun": slack},
            options={"maxiter": 300, "ftol": 1e-10},
        )
        if slack(end.x).min() > -1e-7:
            best = min(best, end.fun)
    found = ncjax.solve_separation(counts, dim, depth=2, starts=12)
    assert found.value == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("num_classes", "dim"), [(5, 3), (6, 4), (7, 4), (7, 5), (8, 5)])
def test_pairs_and_apexes_are_the_best_known_from_half_the_classes_on(num_classes, dim):
    """No random start ends below them."""
    found = search.search((1,) * num_classes, dim, 2, 5, 0)
    expected = num_classes - 1 + np.sqrt(2 * (num_classes - dim) / num_classes)
    assert found.spread[0][0] == pytest.approx(expected, rel=1e-11)
    best = min(
        ncjax.softmax_codes(num_classes, dim=dim).values(), key=lambda code: code.value
    )
    assert best.name.startswith("pairs")
    assert best.value == pytest.approx(expected, rel=1e-13)


def test_the_codes_in_closed_form_are_not_all_minima():
    """K = 7 at four factors: a code of rank 3 is below the whole list."""
    found = ncjax.solve_separation((1,) * 7, 3, depth=3, starts=4)
    least = min(code.value for code in ncjax.softmax_codes(7, 3).values())
    assert found.value / 2 == pytest.approx(5.146936, abs=1e-6)
    assert found.value < 0.99 * least


def test_the_seed_fixes_the_search():
    one, two = (ncjax.solve_separation((2, 1, 1, 1), 2, starts=3, seed=5) for _ in "ab")
    assert one.spread == two.spread
    np.testing.assert_array_equal(one.params.W, two.params.W)


def test_one_layer_of_enough_width_needs_no_search():
    found = ncjax.solve_separation((3, 2, 1), 2)
    assert found.proved
    assert found.source == "SELI"
    assert found.spread is None


@pytest.mark.parametrize("depth", [1, 2])
def test_two_classes_are_solved_at_any_depth(depth):
    found = ncjax.solve_separation((4, 1), 1, depth=depth)
    assert found.proved
    bound = ncjax.separation_value((4, 1)) ** (2 / (depth + 1))
    assert found.value == pytest.approx((depth + 1) / 2 * bound, rel=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 1}, "dim must be at least 2 for num_classes = 5, got 1"),
        ({"dim": 3, "depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"dim": 3, "starts": 0}, "starts must be an integer of at least 1, got 0"),
        ({"dim": 3, "seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ncjax.solve_separation((1,) * 5, **options)


# The nearest code


def turned(params, seed):
    """Rotate the features, permute the classes and scale the point."""
    rng = np.random.default_rng(seed)
    *layers, W, H = [
        *(params.layers if isinstance(params, ncjax.DeepParams) else (params.W,)),
        params.H,
    ]
    order = rng.permutation(len(W))
    frame = np.linalg.qr(rng.normal(size=(H.shape[-1],) * 2))[0]
    H = 3 * (np.asarray(H) @ frame)[order]
    if not layers:
        return ncjax.Params(jnp.asarray((np.asarray(W) @ frame)[order]), jnp.asarray(H))
    first = np.asarray(layers[0]) @ frame
    last = np.asarray(W)[order]
    return ncjax.DeepParams(
        (jnp.asarray(first), *layers[1:], jnp.asarray(last)), jnp.asarray(H)
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_a_code_is_recognised_in_any_orientation_and_order(depth):
    for seed, (name, code) in enumerate(ncjax.softmax_codes(7, depth, 2).items()):
        found = ncjax.nearest_code(turned(code.params, seed))
        assert found.name == name
        assert found.distance < 1e-7
        assert found.value == pytest.approx(code.value, rel=1e-10)


def test_the_distance_is_below_the_least_over_all_permutations():
    rng = np.random.default_rng(0)
    codes = ncjax.softmax_codes(4)
    for _ in range(5):
        params = ncjax.Params(*map(jnp.asarray, rng.normal(size=(2, 4, 3))))
        params = params._replace(H=params.H[:, None])
        matrix = np.asarray(params.W @ params.H[:, 0].T)
        matrix = matrix - matrix.mean(axis=0)
        matrix = matrix / np.linalg.norm(matrix)
        for name, code in codes.items():
            unit = code.matrix / np.linalg.norm(code.matrix)
            least = min(
                np.linalg.norm(matrix - unit[np.ix_(order, order)])
                for order in map(list, itertools.permutations(range(4)))
            )
            found = ncjax.nearest_code(params, {name: code}, tol=2.0)
            assert 0.1 * least < found.distance <= least + 1e-12


def test_a_point_that_is_no_code_is_called_other():
    rng = np.random.default_rng(1)
    params = ncjax.Params(
        jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray(rng.normal(size=(5, 1, 4)))
    )
    found = ncjax.nearest_code(params)
    assert found.name == "other"
    assert found.value == np.inf


def test_solutions_of_a_search_are_codes_to_compare_with():
    best = ncjax.solve_separation((1,) * 7, 3, starts=3)
    found = ncjax.nearest_code(turned(best.params, 3), {"best": best})
    assert found.name == "best"
    assert ncjax.nearest_code(best.params).name == "other"


def test_samples_left_out_do_not_count():
    optimum = ncjax.solve_separation((2, 2, 2, 2), 3)
    H = np.asarray(optimum.params.H).copy()
    H[:, 1] = 7
    spoiled = optimum.params._replace(H=jnp.asarray(H))
    weights = np.array([[1.0, 0.0]] * 4)
    assert ncjax.nearest_code(spoiled, weights=weights).name == "simplex"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": {}}, "codes must be a dictionary from names to codes"),
        ({"codes": ncjax.softmax_codes(5)}, "codes must have the K = 4 classes of params"),
        ({"tol": 0}, "tol must be positive"),
    ],
)
def test_bad_comparisons_are_refused(change, message):
    params = ncjax.block_saddle(2, 2, 1, 4)
    with pytest.raises(ValueError, match=message):
        ncjax.nearest_code(params, **change)


@pytest.mark.parametrize("scale", [1e-150, 1e-80, 1e80, 1e150])
def test_the_nearest_code_does_not_depend_on_the_norm(scale):
    code = ncjax.softmax_codes(4, depth=2, per_class=2)["pairs"]
    found = ncjax.nearest_code(jax.tree.map(lambda leaf: scale * leaf, code.params))
    assert found.name == "pairs"
    assert found.value == pytest.approx(code.value, rel=1e-12)


def test_a_code_with_equal_class_means_is_named():
    simplex = ncjax.softmax_codes(4)["simplex"].params
    zero = jax.tree.map(jnp.zeros_like, simplex)
    with pytest.raises(ValueError, match="code 'zero' must have class means of different"):
        ncjax.nearest_code(simplex, {"zero": zero})


def test_equal_class_means_have_no_nearest_code():
    zero = jax.tree.map(jnp.zeros_like, ncjax.block_saddle(2, 2, 1, 4))
    with pytest.raises(ValueError, match="class means of different and finite logits"):
        ncjax.nearest_code(zero)


# The polygon


# K, n, d: the negative eigenvalues and their multiplicities.
SADDLES = {
    (5, 1, 4): ([-0.223606797750], [4]),
    (6, 2, 4): ([-0.176776695297, -0.117851130198], [2, 4]),
}


def least_on_the_sphere(params, k):
    far = jax.tree.map(lambda leaf: 40 * leaf, params)
    found = ncjax.hessian_eig(ncjax.log_cross_entropy, far, k=k, sphere=True)
    return np.asarray(found.eigenvalues)


@pytest.mark.parametrize("sizes", SADDLES, ids=str)
def test_the_polygon_is_a_saddle_in_more_than_two_dimensions(sizes):
    saddle = ncjax.polygon_saddle(*sizes)
    values, multiplicities = SADDLES[sizes]
    np.testing.assert_allclose(saddle.eigenvalues, values, atol=1e-12)
    assert saddle.multiplicities.tolist() == multiplicities
    assert float(ncjax.squared_norm(saddle.params)) / 2 == pytest.approx(saddle.value)
    assert float(ncjax.margins(saddle.params).min()) == pytest.approx(1, abs=1e-13)
    proof = ncjax.certificate(jax.tree.map(lambda leaf: 40 * leaf, saddle.params))
    assert float(proof.sigma_max) == pytest.approx(saddle.sigma_max, rel=1e-11)
    expected = np.repeat(saddle.eigenvalues, saddle.multiplicities)
    found = least_on_the_sphere(saddle.params, len(expected) + 1)
    np.testing.assert_allclose(found[:-1], expected, atol=1e-11)
    assert found[-1] > -1e-9


@pytest.mark.parametrize("num_classes", [5, 6])
def test_the_polygon_has_no_direction_of_descent_in_its_plane(num_classes):
    flat = ncjax.solve_separation((1,) * num_classes, 2).params
    assert least_on_the_sphere(flat, 1)[0] > -1e-9


def test_the_square_is_the_saddle_of_two_pairs():
    square, pairs = ncjax.polygon_saddle(4, 3, 4), ncjax.block_saddle(2, 2, 3, 4)
    assert square.eigenvalues.tolist() == pytest.approx([-2 / (8 * 3**0.5)], rel=1e-14)
    assert ncjax.nearest_code(square.params).name == "pairs"
    assert square.value == pytest.approx(float(ncjax.squared_norm(pairs)) / 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 4), "num_classes must be an integer of at least 4, got 3"),
        ((5, 1, 2), "dim must be an integer of at least 3, got 2"),
        ((5, 0, 3), "per_class must be an integer of at least 1, got 0"),
    ],
)
def test_bad_polygons_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ncjax.polygon_saddle(*sizes)
