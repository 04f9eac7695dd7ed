"""Minimisers in closed form: reference values, stationarity, optimality, thresholds."""

import math
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy.optimize import minimize_scalar

import ncjax

pytestmark = pytest.mark.usefixtures("quick_compilation")

Objective = partial(ncjax.Objective, "cross_entropy")
Focal = partial(ncjax.Objective, "focal")
Squared = partial(ncjax.Objective, "squared_error")
EQUAL = (3, 3, 3, 3)
SIZES = (9, 4, 1, 1)

# Objective, counts, least margin or None, value: all digits that the theory gives.
REFERENCE = [
    (Objective(weight_decay=(0.1, 0.1)), EQUAL, 4.19391885447, 2.71042508935),
    (Objective(weight_decay=(0.1, 0.1), bias=0.5), EQUAL, 4.19391885447, 2.71042508935),
    (Objective(weight_decay=(0.02, 0.3)), EQUAL, 4.45948198765, 2.20430394861),
    (Objective(weight_decay=(1, 2), bias=0.0), EQUAL, 0.641316629016, 16.0852189478),
    (Objective(ball=(8, 24)), EQUAL, 8 / 3, 2.27206607),
    (Objective(weight_decay=(0.1, 0.1)), (4, 4, 1, 1), None, 2.337116283),
    (
        Objective(weight_decay=(0.02, 0.02), smoothing=0.1),
        EQUAL,
        3.49223548372,
        4.55435266917,
    ),
    (
        Objective(weight_decay=(0.5, 0.5), smoothing=0.1),
        EQUAL,
        1.98669159115,
        11.0849688002,
    ),
    (Focal(gamma=2, weight_decay=(0.05, 0.05)), EQUAL, 2.49719185272, 0.752660312047),
    (Focal(gamma=2, weight_decay=(0.5, 0.5)), EQUAL, 1.32264087702, 4.82729295026),
    (Squared(weight_decay=(0.2, 0.2)), EQUAL, 1 - 0.2 / 3**0.5, 1.30564064606),
    (Squared(weight_decay=(0.1, 0.9)), EQUAL, 1 - 0.3 / 3**0.5, 1.89846096908),
    (Squared(weight_decay=(0.5, 0.5)), SIZES, 0.5, 3.0),
    (Squared(weight_decay=(1.5, 1.5)), SIZES, 0.0, 6.25),
    (Squared(weight_decay=(0.5, 0.5), bias=0.0), SIZES, None, 1.96869014167),
    (Squared(weight_decay=(1.5, 1.5), bias=0.0), SIZES, None, 3.80203545321),
    (Squared(weight_decay=(0.2, 0.2), bias=0.5), EQUAL, None, 1.03923048454),
    (Squared(weight_decay=(0.2, 0.2), bias=2.0), EQUAL, None, 1.18564064606),
    # Two groups: K_A, K_B, n_A, n_B = 2, 3, 8, 2 and 1, 3, 10, 2.
    (Objective(weight_decay=(0.5, 0.5)), (8, 8, 2, 2, 2), 2.176805407, 15.7202312071),
    (Objective(weight_decay=(1.3, 1.3)), (8, 2, 8, 2, 2), 0.3164447724, 28.5865116248),
    (Objective(weight_decay=(1.5, 1.5)), (2, 8, 8, 2, 2), 0.0, 30.3935158264),
    (Objective(weight_decay=(0.7, 0.7)), (2, 2, 2, 10), 1.531705449, 12.9274719596),
]
# Objectives of every other kind, compared with themselves.
OTHERS = [
    (Objective(ball=(8, 24), bias=0.0), EQUAL),
    (Objective(ball=(8, 24), smoothing=0.1), EQUAL),
    (Objective(ball=(80, 24), smoothing=0.1), EQUAL),
    (Objective(ball=(8, 3)), (4, 4, 1, 1)),
    (Objective(temperature=3.0), EQUAL),
    (Focal(gamma=2, temperature=3.0), EQUAL),
    (Focal(gamma=2, ball=(8, 24)), EQUAL),
    (Focal(gamma=0.5, weight_decay=(0.2, 0.1), bias=0.3), EQUAL),
    (Squared(ball=(2, 3)), SIZES),
    (Squared(ball=(2, 2), bias=0.0), SIZES),
    (Objective(fixed_classifier=True, weight_decay=(0.1, 0.1)), SIZES),
    (Objective(fixed_classifier=True, weight_decay=(0.0, 0.1), smoothing=0.1), SIZES),
    (Objective(fixed_classifier=True, ball=(5, 3)), SIZES),
    (Focal(fixed_classifier=True, gamma=2, weight_decay=(0, 0.1)), SIZES),
    (Squared(fixed_classifier=True, weight_decay=(0, 0.1)), SIZES),
    (Squared(fixed_classifier=True, weight_decay=(0, 0.1), bias=0.4), EQUAL),
]
CASES = [row[:2] for row in REFERENCE] + OTHERS


def equal(decay):
    return Objective(weight_decay=(decay, decay))


def name(value):
    if isinstance(value, ncjax.Objective):
        fields = vars(value) | {"loss": None}
        kind = [
            f"{key}={item}" for key, item in fields.items() if item not in (None, False)
        ]
        return f"{value.loss} {' '.join(kind)}"
    return str(value)


def to_its_digits(value):
    """Half a unit of the last digit; short numbers are exact."""
    decimals = len(str(value).partition(".")[2])
    error = 0.51 * 10**-decimals if 5 <= decimals <= 12 else 1e-12
    return pytest.approx(value, rel=0, abs=error)


@jax.jit
def on_ball(objective, params, weights):
    return jax.value_and_grad(lambda p: objective.on_boundary(p, weights))(params)


@jax.jit
def plain(objective, params, weights):
    return jax.value_and_grad(lambda p: objective(p, weights))(params)


def fills_the_ball(objective, params):
    if objective.ball is None:
        return False
    return math.isclose(float(jnp.sum(params.H**2)), objective.ball[1], rel_tol=1e-12)


def padded(params, weights):
    """The point with 3 samples more, weight 0, so that few shapes are compiled."""
    K, n, _ = params.H.shape
    weights = jnp.ones((K, n)) if weights is None else weights
    more = ((0, 0), (0, max(0, 10 - n)))
    return params._replace(H=jnp.pad(params.H, (*more, (0, 0)))), jnp.pad(weights, more)


@pytest.mark.parametrize(("objective", "counts", "margin", "value"), REFERENCE, ids=name)
def test_values_of_the_theory(objective, counts, margin, value):
    best = ncjax.minimiser(objective, counts, dim=6)
    assert best.value == to_its_digits(value)
    assert best.proved
    assert best.margin == best.margins.min()
    if margin is not None:
        assert best.margin == to_its_digits(margin)


@pytest.mark.parametrize(("objective", "counts"), CASES, ids=name)
def test_a_minimiser_is_stationary_and_no_point_near_it_is_lower(objective, counts):
    best = ncjax.minimiser(objective, counts, dim=6)
    params, weights = padded(best.params, best.weights)
    function = on_ball if fills_the_ball(objective, params) else plain
    value, gradient = function(objective, params, weights)
    assert float(value) == pytest.approx(best.value, rel=1e-13)
    scale = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in params))
    for leaf in gradient:
        np.testing.assert_allclose(leaf, 0, atol=2e-13 * (1 + scale))
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2, 1.0, 10.0):
        near = type(params)(*(x + size * rng.normal(size=x.shape) for x in params))
        if objective.fixed_classifier:
            near = near._replace(W=params.W)
        assert float(function(objective, near, weights)[0]) >= best.value * (1 - 1e-13)


@pytest.mark.parametrize(("objective", "counts"), CASES, ids=name)
def test_norms_are_balanced_and_left_out_samples_are_zero(objective, counts):
    best = ncjax.minimiser(objective, counts, dim=6)
    W, H = (np.asarray(leaf) for leaf in best.params[:2])
    left_out = np.arange(max(counts)) >= np.array(counts)[:, None]
    assert not H[left_out].any()
    if objective.bias is None:
        assert isinstance(best.params, ncjax.Params)
    if best.weights is not None:
        np.testing.assert_array_equal(best.weights, ncjax.sample_weights(counts))
    squares = np.sum(W**2), np.sum(H**2)
    if objective.ball is not None and not objective.fixed_classifier:
        within = np.array(squares) / objective.ball
        assert within[0] == pytest.approx(within[1], rel=1e-12)
        assert within[0] <= 1 + 1e-12
    elif objective.weight_decay is not None and not objective.fixed_classifier:
        features = H.reshape(-1, H.shape[-1])
        decay_W, decay_H = objective.weight_decay
        np.testing.assert_allclose(
            decay_W * W.T @ W, decay_H * features.T @ features, atol=1e-12
        )


@pytest.mark.parametrize("dim", [3, 4, 5])
def test_every_dimension_from_K_minus_1_on_holds_the_same_optimum(dim):
    objective = Objective(weight_decay=(0.1, 0.1))
    best = ncjax.minimiser(objective, EQUAL, dim)
    assert best.params.W.shape == (4, dim)
    assert best.value == pytest.approx(2.71042508935, rel=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("bias", [None, 0.0])
def test_the_squared_error_keeps_the_largest_singular_values(dim, bias):
    """The best of several local searches with this dimension finds the same value."""
    from scipy.optimize import minimize

    counts, decay = np.array((5, 3, 2, 2)), 0.3
    best = ncjax.minimiser(
        Squared(weight_decay=(decay, decay), bias=bias), tuple(counts), dim
    )
    assert best.proved

    def value_and_gradient(flat):
        W, H = flat[: 4 * dim].reshape(4, dim), flat[4 * dim : 8 * dim].reshape(4, dim)
        error = H @ W.T + flat[8 * dim :] - np.eye(4)
        slopes = counts[:, None] * error
        decays = (np.sum(W**2) + np.sum(counts[:, None] * H**2)) * decay / 2
        of_W = slopes.T @ H + decay * W
        of_H = slopes @ W + decay * counts[:, None] * H
        of_b = slopes.sum(axis=0) if bias == 0 else np.zeros(4)
        gradient = np.concatenate([of_W.ravel(), of_H.ravel(), of_b])
        return np.sum(slopes * error) / 2 + decays, gradient

    rng = np.random.default_rng(dim)
    starts = rng.normal(size=(5, 8 * dim + 4))
    starts[:, 8 * dim :] = 0
    searches = [minimize(value_and_gradient, x, jac=True, tol=1e-10) for x in starts]
    found = min(search.fun for search in searches)
    assert best.value == pytest.approx(found, rel=1e-8)


class_numbers = st.integers(3, 12)
samples = st.integers(1, 20)
strengths = st.floats(1e-4, 1.2)


@given(class_numbers, samples, strengths, st.floats(0, 0.6))
def test_smoothed_cross_entropy_has_the_least_value_on_the_ray(K, n, share, alpha):
    mu = share * math.sqrt(n)
    objective = Objective(weight_decay=(mu, mu), smoothing=alpha)
    best = ncjax.minimiser(objective, (n,) * K, K)

    def value(m):
        loss = math.log1p((K - 1) * math.exp(-m)) + alpha * (K - 1) / K * m
        return K * n * loss + mu * (K - 1) * math.sqrt(n) * m

    found = minimize_scalar(value, bounds=(0, 50), options={"xatol": 1e-9})
    assert best.value == pytest.approx(min(found.fun, value(0)), rel=1e-11)
    assert best.margin == pytest.approx(found.x, abs=1e-4)
    assert (best.margin == 0) == (mu >= (1 - alpha) * math.sqrt(n))


@given(class_numbers, samples, strengths, st.floats(0.01, 6))
def test_the_focal_loss_has_the_least_value_on_the_ray(K, n, share, gamma):
    mu = share * math.sqrt(n)
    best = ncjax.minimiser(Focal(gamma=gamma, weight_decay=(mu, mu)), (n,) * K, K)

    def value(m):
        error = (K - 1) / (math.exp(m) + K - 1)
        loss = error**gamma * math.log1p((K - 1) * math.exp(-m))
        return K * n * loss + mu * (K - 1) * math.sqrt(n) * m

    grid = np.linspace(0, 40, 4001)
    m = grid[np.argmin([value(m) for m in grid])]
    found = minimize_scalar(value, bounds=(max(m - 0.02, 0), m + 0.02))
    assert best.value == pytest.approx(min(found.fun, value(0)), rel=1e-9)


@given(class_numbers, st.floats(0.01, 6), strengths, st.integers(0, 2**31))
def test_the_focal_bound_holds_where_it_is_called_proved(K, gamma, share, seed):
    """The loss of any logits plus the norm is never below the value."""
    objective = Focal(gamma=gamma, weight_decay=(share, share))
    best = ncjax.minimiser(objective, (1,) * K, K)
    if not best.proved:
        assert K > 5
        return
    rng = np.random.default_rng(seed)
    for scale in (0.01, 0.3, 3.0, 30.0):
        logits = scale * rng.normal(size=(K, K)) + rng.choice((-3, 0, 3)) * np.eye(K)
        logs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        p = np.exp(np.diag(logs))
        value = np.sum((1 - p) ** gamma * -np.diag(logs))
        assert value + share * np.linalg.norm(logits, "nuc") >= best.value * (1 - 1e-12)


@pytest.mark.parametrize(("gamma", "most"), [(1, 8), (2, 6), (3, 5), (5, 6)])
def test_up_to_which_number_of_classes_the_focal_loss_is_settled(gamma, most):
    def settled(K):
        strength = np.linspace(0.9, 1.4, 40)
        objectives = [Focal(gamma=gamma, weight_decay=(x, x)) for x in strength]
        return all(ncjax.minimiser(o, (1,) * K, K).proved for o in objectives)

    assert settled(most)
    assert not settled(most + 1)


def is_zero(objective, counts, dim=6):
    return not np.asarray(ncjax.minimiser(objective, counts, dim).params.W).any()


@pytest.mark.parametrize(
    ("make", "counts", "threshold"),
    [
        (Objective, EQUAL, math.sqrt(3)),
        (partial(Objective, smoothing=0.1), EQUAL, 0.9 * math.sqrt(3)),
        (partial(Focal, gamma=2), EQUAL, 1.87470317965),
        (Squared, EQUAL, math.sqrt(3)),
        (Squared, SIZES, 3.0),
        (Objective, (8, 8, 2, 2, 2), math.sqrt(8)),
        (Objective, (10, 2, 2, 2), math.sqrt(8)),  # a = (K_B n_A + K_A n_B) / K
    ],
)
def test_from_which_decay_on_the_minimiser_is_zero(make, counts, threshold):
    below, above = threshold - 1e-6, threshold + 1e-6
    assert not is_zero(make(weight_decay=(below, below)), counts)
    assert is_zero(make(weight_decay=(above, above)), counts)


def test_from_which_decay_of_the_bias_on_the_classifier_has_no_mean():
    threshold = 1.5665276818

    def mean_and_bias(decay):
        objective = Squared(weight_decay=(0.2, 0.2), bias=decay)
        params = ncjax.minimiser(objective, EQUAL, 6).params
        return np.abs(np.asarray(params.W).sum(axis=0)).max(), float(params.b[0])

    assert mean_and_bias(threshold - 1e-6)[0] < 1e-12
    assert mean_and_bias(threshold + 1e-6)[0] > 1e-6
    assert mean_and_bias(0.5)[1] == pytest.approx(0.24, abs=1e-12)
    assert mean_and_bias(2.0)[1] == pytest.approx(0.173205080757, abs=1e-12)


@pytest.mark.parametrize("K", [3, 5])
def test_the_norm_ball_of_class_means_has_the_margin_of_fang(K):
    best = ncjax.minimiser(Objective(ball=(K * 2.0, K * 3.0)), (1,) * K, K)
    assert best.margin == pytest.approx(K / (K - 1) * math.sqrt(6), rel=1e-14)
    unit = ncjax.minimiser(Objective(ball=(K, K)), (1,) * K, K)  # Lu and Steinerberger
    assert unit.margin == pytest.approx(K / (K - 1), rel=1e-14)


@given(st.integers(3, 6), st.floats(1e-3, 5), st.floats(0.1, 4), st.floats(0, 3))
def test_features_of_a_fixed_etf_have_the_least_value(K, decay, weight, gamma):
    objective = Focal(fixed_classifier=True, gamma=gamma, weight_decay=(0, decay))
    counts, weights = (1,) * K, (weight,) + (1.0,) * (K - 1)
    best = ncjax.minimiser(objective, counts, K, class_weights=weights)

    def value(c):
        m = c * K / (K - 1)
        loss = math.log1p((K - 1) * math.exp(-m))
        error = (K - 1) / (math.exp(m) + K - 1)
        return weight * error**gamma * loss + decay / 2 * c**2

    found = minimize_scalar(value, bounds=(0, 60), options={"xatol": 1e-10})
    length = float(np.linalg.norm(best.params.H[0, 0]))
    if best.proved:
        assert length == pytest.approx(found.x, abs=1e-5)
        assert value(length) <= found.fun * (1 + 1e-12)
        assert float(best.params.H[0, 0] @ best.params.W[0]) == pytest.approx(length)


def test_class_weights_on_a_fixed_classifier_share_the_ball():
    best = ncjax.minimiser(
        Objective(fixed_classifier=True, ball=(4, 5)),
        (2, 1, 1, 1),
        3,
        class_weights=(1, 1, 2, 9),
    )
    lengths = np.linalg.norm(np.asarray(best.params.H)[:, 0], axis=1)
    assert np.sum(np.array((2, 1, 1, 1)) * lengths**2) == pytest.approx(5, rel=1e-12)
    assert lengths[0] == pytest.approx(lengths[1])
    assert lengths[1] < lengths[2] < lengths[3]
    np.testing.assert_array_equal(best.weights[:, 0], (1, 1, 2, 9))


def test_equal_class_weights_scale_the_objective():
    objective = Objective(weight_decay=(0.2, 0.2))
    best = ncjax.minimiser(objective, EQUAL, 6, class_weights=(2,) * 4)
    assert best.value == pytest.approx(2 * 2.71042508935, rel=1e-10)
    np.testing.assert_array_equal(best.weights, np.full((4, 3), 2.0))


def test_class_weights_of_the_squared_error_keep_other_classes():
    """-G Wᵀ⁺ has singular values of at most mu, which proves the optimum."""
    counts, weights, mu = np.array((5, 3, 2)), np.array((0.5, 1.0, 3.0)), 0.9
    best = ncjax.minimiser(
        Squared(weight_decay=(mu, mu)), tuple(counts), 3, class_weights=weights
    )
    logits = np.asarray(best.params.H)[:, 0] @ np.asarray(best.params.W).T
    slopes = (weights * np.sqrt(counts))[:, None] * (logits - np.eye(3))
    assert np.linalg.norm(slopes, 2) <= mu * (1 + 1e-12)
    scaled = np.sqrt(counts)[:, None] * logits
    assert -np.sum(slopes * scaled) == pytest.approx(mu * np.linalg.norm(scaled, "nuc"))


def test_dtype_is_the_dtype_of_the_point():
    objective = Objective(weight_decay=(0.1, 0.1), bias=0.0)
    best = ncjax.minimiser(objective, (3, 3), 2, dtype=jnp.float32)
    assert {leaf.dtype for leaf in best.params} == {jnp.dtype("float32")}
    assert isinstance(best.value, float)


def test_numbers_under_jit_get_one_line():
    with pytest.raises(ValueError, match="traced ones"):
        jax.jit(lambda decay: ncjax.minimiser(equal(decay), EQUAL, 6).value)(0.1)


def test_five_hundred_classes_and_two_classes():
    many = ncjax.minimiser(equal(0.1), (2,) * 500, 499)
    assert many.margin == pytest.approx(math.log(500 * 2**0.5 / 0.1 - 499), rel=1e-12)
    two = ncjax.minimiser(equal(0.1), (2, 1), 1)
    assert two.params.W.shape == (2, 1)
    assert two.margins.min() > 0


@pytest.mark.parametrize("radius", [1e-12, 1e-6])
def test_a_tiny_ball_is_filled_by_two_sizes_of_classes(radius):
    best = ncjax.minimiser(Objective(ball=(radius, radius)), (3, 3, 3, 1, 1), 4)
    for leaf in best.params:
        assert float(jnp.sum(leaf**2)) == pytest.approx(radius, rel=1e-12)


@pytest.mark.parametrize("mu", [1e-300, 1e-200])
def test_products_of_decays_and_of_bounds_beyond_the_range_of_floats(mu):
    """Margins with a large part in common: log(K sqrt(n) / mu) for small mu."""
    best = ncjax.minimiser(equal(mu), EQUAL, 3)
    assert best.margin == pytest.approx(math.log(4 * 3**0.5) - math.log(mu), rel=1e-13)
    two_sizes = ncjax.minimiser(equal(mu), (3, 3, 3, 1), 3)
    assert two_sizes.margin == pytest.approx(best.margin, abs=2)
    assert equal(mu).mu == pytest.approx(mu)
    far = Objective(ball=(1 / mu, 1 / mu))
    assert far.tau == pytest.approx(1 / mu)
    assert float(ncjax.minimiser(far, EQUAL, 3).margin) == pytest.approx(
        1 / (3 * 3**0.5 * mu)
    )


@pytest.mark.parametrize("bound", [1e-12, 1e6, 1e12])
@pytest.mark.parametrize("make", [Objective, partial(Focal, gamma=2)])
def test_features_of_a_fixed_etf_fill_any_ball(make, bound):
    """Far out the margins differ by the logarithms of the lengths alone."""
    best = ncjax.minimiser(
        make(fixed_classifier=True, ball=(4, bound)),
        (3, 3, 2, 1),
        3,
        class_weights=(1, 1, 4, 1),
    )
    assert float(jnp.sum(best.params.H**2)) == pytest.approx(bound, rel=1e-12)
    if bound > 1:
        rate = 1 if make is Objective else 3  # the loss decays like e^(-rate margin)
        assert best.margins[2] - best.margins[0] == pytest.approx(
            math.log(4) / rate, rel=0.05
        )


def test_a_large_ball_needs_no_overflow():
    best = ncjax.minimiser(Objective(ball=(1e5, 1e5)), EQUAL, 6)
    assert best.margin == pytest.approx(1e5 / (3 * math.sqrt(3)))
    assert best.value == 0


@pytest.mark.parametrize(
    ("objective", "counts", "dim", "message"),
    [
        (Objective(), EQUAL, 6, "solve_separation"),
        (Focal(gamma=2), EQUAL, 6, "solve_separation"),
        (Objective(smoothing=0.1), EQUAL, 6, "unbounded set"),
        (Squared(), EQUAL, 6, "unbounded set"),
        (Objective(weight_decay=(0.1, 0)), EQUAL, 6, "weight_decay must be positive"),
        (Objective(weight_decay=(0, 0.1)), EQUAL, 6, "weight_decay must be positive"),
        (
            Objective(weight_decay=(0.1, 0.1)),
            EQUAL,
            2,
            "dim must be at least num_classes - 1",
        ),
        (Objective(temperature=1.0), EQUAL, 2, "dim must be at least num_classes - 1"),
        (Objective(weight_decay=(0.1, 0.1)), (3, 2, 1), 6, "3 different sizes"),
        (Objective(weight_decay=(0.1, 0.1), bias=0.0), (3, 2), 6, "a bias and classes"),
        (Focal(gamma=1, ball=(1, 1)), (3, 2), 6, "gradient_flow"),
        (Objective(temperature=1.0), (3, 2), 6, "gradient_flow"),
        (Objective(temperature=9.0, smoothing=0.1), EQUAL, 6, "up to temperature"),
        (Squared(temperature=1.0), EQUAL, 6, "squared error at a temperature"),
        (Squared(weight_decay=(1, 1), bias=1.0), (3, 2), 6, "bias > 0"),
        (Focal(gamma=2, weight_decay=(1, 1)), (3, 0), 6, "counts must be"),
        (Focal(gamma=2, weight_decay=(1, 1)), EQUAL, 0, "dim must be an integer"),
        (ncjax.cross_entropy, EQUAL, 6, "objective must be an ncjax.Objective"),
        (ncjax.Objective(lambda z, y: z, ball=(1, 1)), EQUAL, 6, "a loss of your own"),
    ],
)
def test_what_has_no_minimiser_or_no_closed_form_gets_one_line(
    objective, counts, dim, message
):
    with pytest.raises(ValueError, match=message) as error:
        ncjax.minimiser(objective, counts, dim)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [(1, 2), (1, 0, 1), (1, -1, 1), (1, math.nan, 1)])
def test_class_weights_must_be_positive(weights):
    objective = Objective(weight_decay=(0.1, 0.1))
    with pytest.raises(ValueError, match="class_weights must"):
        ncjax.minimiser(objective, (1, 1, 1), 3, class_weights=weights)
