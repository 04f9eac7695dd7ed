"""Certificates of points: bounds against NumPy and SciPy, verdicts at known points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from regularised import Model, descend
from strategies import seeds, sine_params

import ncjax
from ncjax.objectives import certificates

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, D = 4, 3, 6
EPS = 1e-12


def words(found):
    return ncjax.POINT_VERDICTS[int(found.verdict)]


def point(z, model):
    """The vector of a model as a point."""
    num_classes, per_class, dim = model.shape
    W, H, b = model.split(np.asarray(z))
    H = H.reshape(num_classes, per_class, dim)
    if model.bias is None:
        return ncjax.Params(jnp.asarray(W), jnp.asarray(H))
    return ncjax.BiasedParams(jnp.asarray(W), jnp.asarray(H), jnp.asarray(b))


def objective_of(model):
    return ncjax.Objective(
        model.loss,
        smoothing=model.smoothing or None,
        gamma=model.gamma or None,
        weight_decay=None if model.ball is not None else model.decay,
        ball=model.ball,
        bias=model.bias,
    )


def certify(z, model):
    weights = None if model.weights is None else jnp.asarray(model.weights)
    return ncjax.certificate(point(z, model), objective_of(model), weights=weights)


def on_norms(params, a, b):
    W, H = params
    return ncjax.Params(W * a**0.5 / jnp.linalg.norm(W), H * (b / jnp.sum(H**2)) ** 0.5)


def collapse(margin, decay=(1.0, 1.0), num_classes=K, per_class=N, dim=D):
    """The point with logits `margin P` and the norms that the decays balance."""
    rows = ncjax.simplex_etf(num_classes, dim)
    rows = rows * ((num_classes - 1) / num_classes) ** 0.5  # rows rowsᵀ = P
    ratio = (decay[1] / decay[0]) ** 0.25
    W = ratio * (per_class**0.5 * margin) ** 0.5 * rows
    H = (margin / per_class**0.5) ** 0.5 / ratio * rows
    return ncjax.Params(W, jnp.repeat(H[:, None], per_class, axis=1))


def with_bias(params, b):
    return ncjax.BiasedParams(*params, jnp.asarray(b, params.W.dtype))


# The bounds


def uneven():
    k, i, j = np.arange(4)[:, None, None], np.arange(4)[None, :, None], np.arange(6)
    return sine_params()._replace(H=jnp.asarray(0.3 * np.cos(2 + 5 * k + 11 * i + 13 * j)))


@pytest.mark.parametrize(
    ("params", "objective", "counts", "value", "bound"),
    [
        (sine_params, {"weight_decay": (0.1, 0.1)}, None, 16.79666778715, 2.62367189223),
        (uneven, {"weight_decay": (0.1, 0.1)}, (4, 4, 1, 1), 13.943389079, 1.983710315),
        (
            lambda: on_norms(sine_params(), 8, 24),
            {"ball": (8, 24)},
            None,
            21.8099828445,
            0.716375246727,
        ),
        (
            sine_params,
            {"loss": "squared_error", "weight_decay": (0.2, 0.2)},
            None,
            6.92396837209,
            1.05847900777,
        ),
        (
            lambda: with_bias(sine_params(), 0.3 * np.cos(np.arange(4))),
            {"weight_decay": (0.1, 0.1), "bias": 0.5},
            None,
            17.178653703262,
            2.587524811657,
        ),
    ],
    ids=["decay", "counts", "ball", "squared_error", "bias"],
)
def test_values_and_bounds_at_the_reference_start(params, objective, counts, value, bound):
    weights = None if counts is None else ncjax.sample_weights(counts)
    found = ncjax.certificate(params(), ncjax.Objective(**objective), weights=weights)
    np.testing.assert_allclose(found.value, value, rtol=2e-10)
    np.testing.assert_allclose(found.bound, bound, rtol=5e-9)
    assert words(found) == "not a critical point"


def dual(theta, model, z):
    """The dual bound at theta, from the definition in loops over samples."""
    W, H, b = model.split(z)
    _, G = model.loss_and_slopes(H @ W.T + b)
    omega, T = model.omega(), model.targets()
    total = 0.0
    for g, weight, target in zip(G, omega, T, strict=True):
        if weight == 0:
            continue
        if model.loss == "squared_error":
            total -= theta * g @ target + theta**2 * g @ g / (2 * weight)
        else:
            q = np.maximum(target + theta * g / weight, 1e-300)
            total -= weight * q @ np.log(q)
    if model.ball is not None:
        total -= theta * np.prod(model.ball) ** 0.5 * np.linalg.norm(G, 2)
    if model.bias:
        total -= theta**2 * np.sum(G.sum(0) ** 2) / (2 * model.bias)
    return total


KINDS = {
    "decay": Model((3, 2, 4), decay=(0.1, 0.3)),
    "smoothing": Model((3, 2, 4), smoothing=0.1, decay=(0.05, 0.05)),
    "squared_error": Model((3, 2, 4), "squared_error", decay=(0.2, 0.4)),
    "ball": Model((3, 2, 4), ball=(5.0, 7.0)),
    "bias": Model((3, 2, 4), decay=(0.1, 0.2), bias=0.3),
}
OTHERS = {
    "free_bias": Model((3, 2, 4), decay=(0.1, 0.2), bias=0.0),
    "focal": Model((3, 2, 4), "focal", gamma=2.0, decay=(0.05, 0.1)),
}


@given(
    st.sampled_from(sorted(KINDS | OTHERS)),
    seeds,
    st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    st.floats(-2, 1),
    st.lists(st.floats(0.2, 3), min_size=3, max_size=3),
    st.integers(0, 3),
)
def test_no_bound_exceeds_the_value_or_the_optimum(
    kind, seed, scale, exponent, class_weights, left_out
):
    model = (KINDS | OTHERS)[kind]
    factor = 10.0**exponent
    model = model._replace(decay=(factor * model.decay[0], factor * model.decay[1]))
    if kind != "focal":
        weights = np.outer(class_weights, np.ones(2))
        weights[:left_out, 1] = 0
        model = model._replace(weights=weights)
    z = model.random(seed, scale)
    found = certify(z, model)
    optimum, _ = model.minimise(starts=1)
    assert found.bound <= optimum * (1 + 1e-7)
    if model.ball is None:  # a point beyond the ball may have a smaller loss
        W, H, b = model.split(z)
        kept = model.omega()[:, None] > 0
        z = np.concatenate([W.ravel(), np.where(kept, H, 0).ravel(), b[: model.extra]])
        value = model.value_and_grad(z)[0]
        np.testing.assert_allclose(found.value, value, rtol=1e-9)
        assert found.gap >= -EPS * value
    if kind in KINDS and found.theta > 1e-12:
        thetas = np.linspace(0, 1, 50)
        if model.ball is None:
            thetas *= min(1, np.prod(model.decay) ** 0.5 / float(found.sigma_max))
        best = max(dual(theta, model, z) for theta in thetas)
        np.testing.assert_allclose(
            found.bound, dual(float(found.theta), model, z), rtol=1e-9, atol=1e-9
        )
        assert found.bound >= best - 1e-9 * abs(best)


@given(st.sampled_from(["cross_entropy", "squared_error"]), seeds, seeds)
def test_the_bound_of_a_free_bias_does_not_depend_on_the_bias(loss, seed, other):
    model = KINDS["bias"]._replace(loss=loss, bias=0.0)
    z = model.random(seed)
    moved = z.copy()
    moved[-3:] = 3 * np.random.default_rng(other).normal(size=3)
    bounds = [certify(each, model).bound for each in (z, moved)]
    np.testing.assert_allclose(*bounds, rtol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
def test_the_focal_bound_holds_for_many_classes_too(gamma):
    """Beyond the range where collapse is known to be optimal."""
    for decay in (0.01, 0.2, 0.4, 1.0):
        model = Model((12, 1, 12), "focal", gamma=gamma, decay=(decay, decay))
        optimum, z = model.minimise(starts=1)
        assert certify(z, model).bound <= optimum * (1 + 1e-9)


def test_the_focal_bound_is_zero_where_no_minimum_is_attained_or_slopes_underflow():
    big = ncjax.Objective("focal", gamma=10, ball=(1e3, 1e3))
    free = ncjax.Objective("focal", gamma=2, weight_decay=(0, 0.1), fixed_classifier=True)
    for objective in (big, free):
        found = ncjax.certificate(sine_params(), objective)
        assert 0 <= found.bound < 1e-300
        assert found.theta == 0


# Verdicts at minimisers


def margin_of_decay(mu, smoothing=0.0, num_classes=K, per_class=N):
    return np.log(num_classes / (mu / per_class**0.5 + smoothing) - num_classes + 1)


@pytest.mark.parametrize("decay", [(0.1, 0.1), (0.02, 0.3), (1e-8, 1e-8)])
def test_collapse_is_optimal_with_decay(decay):
    margin = margin_of_decay(np.prod(decay) ** 0.5)
    params = collapse(margin, decay)
    found = ncjax.certificate(params, ncjax.Objective(weight_decay=decay))
    assert words(found) == "globally optimal point"
    assert abs(found.gap) < 1e-12 * found.value
    assert found.residual < 1e-12
    np.testing.assert_allclose(found.sigma_max, found.mu, rtol=1e-12)


def test_zero_is_optimal_from_the_threshold_on():
    origin = jax.tree.map(jnp.zeros_like, sine_params())
    for decay, verdict in [(1.7, "strict saddle point"), (1.8, "globally optimal point")]:
        found = ncjax.certificate(origin, ncjax.Objective(weight_decay=(decay, decay)))
        assert words(found) == verdict
        assert found.residual == 0


OPTIMA = {
    "ball": (
        {"ball": (8.0, 24.0)},
        lambda: on_norms(collapse(1.0), 8, 24),
        2.272066072546,
    ),
    "smoothing": (
        {"smoothing": 0.1, "weight_decay": (0.02, 0.02)},
        lambda: collapse(margin_of_decay(0.02, 0.1)),
        4.55435266917,
    ),
    "temperature": (
        {"temperature": 5.0},
        lambda: collapse(1.0),
        12 * np.log1p(3 * np.exp(-20 / 3)),
    ),
    "focal": (
        {"loss": "focal", "gamma": 2, "weight_decay": (0.05, 0.05)},
        lambda: collapse(2.49719185272),
        0.752660312047,
    ),
    "free_bias": (
        {"weight_decay": (0.1, 0.1), "bias": 0.0},
        lambda: with_bias(collapse(margin_of_decay(0.1)), [7.0] * 4),
        2.71042508935,
    ),
    "bias_of_squared_error": (
        {"loss": "squared_error", "weight_decay": (0.2, 0.2), "bias": 0.0},
        lambda: with_bias(collapse(1 - 0.2 / 3**0.5), [0.25] * 4),
        3 * (0.2 * 3**0.5 - 0.02),
    ),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_collapse_is_optimal_for_every_objective(name):
    settings, params, value = OPTIMA[name]
    found = ncjax.certificate(params(), ncjax.Objective(**settings))
    np.testing.assert_allclose(found.value, value, rtol=1e-9)
    assert words(found) == "globally optimal point"
    assert abs(found.gap) < 1e-8 * found.value


@pytest.mark.parametrize("loss", ["squared_error", "smoothing"])
def test_an_optimum_inside_the_ball_is_certified_and_outside_it_is_not(loss):
    """There the slopes vanish, so that no relative gradient is defined."""
    if loss == "smoothing":
        settings = {"smoothing": 0.1}
        params = collapse(margin_of_decay(0.0, 0.1))
    else:
        settings = {"loss": loss}
        frame = jnp.eye(K, D)  # M = Y
        params = ncjax.Params(frame, jnp.repeat(frame[:, None], N, axis=1))
    for bound, verdict in [(50.0, "globally optimal point"), (1.0, "not a critical point")]:
        objective = ncjax.Objective(**settings, ball=(bound, bound))
        assert words(ncjax.certificate(params, objective)) == verdict
    moved = params._replace(W=params.W.at[0, 0].add(1e-3))
    found = ncjax.certificate(moved, ncjax.Objective(**settings, ball=(50.0, 50.0)))
    assert words(found) == "not a critical point"


def test_rows_of_zeros_have_no_unit_vector():
    origin = jax.tree.map(jnp.zeros_like, sine_params())
    with jax.debug_nans(True):
        found = ncjax.certificate(origin, ncjax.Objective(temperature=5.0))
    assert words(found) == "not a critical point"
    assert found.residual >= 1


@pytest.mark.parametrize(
    ("objective", "counts"),
    [
        (ncjax.Objective(weight_decay=(1.3, 1.3)), (8, 8, 2, 2, 2)),
        (ncjax.Objective(weight_decay=(1.5, 1.5)), (8, 8, 2, 2, 2)),  # a class merges
        (ncjax.Objective(ball=(8.0, 8.0)), (4, 4, 1, 1)),
        (
            ncjax.Objective("squared_error", weight_decay=(0.5, 0.5), bias=0.0),
            (9, 4, 1, 1),
        ),
    ],
)
def test_minimisers_of_uneven_classes_are_certified(objective, counts):
    best = ncjax.minimiser(objective, counts, 6)
    found = ncjax.certificate(best.params, objective, weights=best.weights)
    assert words(found) == "globally optimal point"
    assert abs(found.gap) < 1e-12 * found.value


def test_the_frame_of_squared_error_is_optimal():
    """`M = (1 - mu / √n) Y`, the optimum of any counts with its weights."""
    mu, counts = 0.5, (4, 4, 1, 1)
    shrunk = np.sqrt(np.maximum(np.sqrt(counts) - mu, 0))
    W = jnp.asarray(shrunk[:, None] * np.eye(4, 6))
    H = W / np.sqrt(counts)[:, None]
    params = ncjax.Params(W, jnp.repeat(H[:, None], 4, axis=1))
    objective = ncjax.Objective("squared_error", weight_decay=(mu, mu))
    found = ncjax.certificate(params, objective, weights=ncjax.sample_weights(counts))
    np.testing.assert_allclose(found.value, 6 * mu - 2 * mu**2, rtol=1e-13)
    assert words(found) == "globally optimal point"
    assert abs(found.gap) < 1e-13


def test_samples_of_weight_zero_count_as_absent():
    params, objective = uneven(), ncjax.Objective(ball=(4.0, 9.0), bias=0.4)
    params = with_bias(params, [0.1, -0.2, 0.3, 0.0])
    weights = jnp.tile(jnp.asarray([1.0, 1.0, 1.0, 0.0]), (4, 1))
    padded = ncjax.certificate(params, objective, weights=weights)
    alone = ncjax.certificate(params._replace(H=params.H[:, :3]), objective)
    for name in ("value", "bound", "theta", "sigma_max", "mu", "residual"):
        np.testing.assert_allclose(
            getattr(padded, name), getattr(alone, name), rtol=1e-10, err_msg=name
        )


@pytest.mark.parametrize(
    "settings", [{"weight_decay": (0.1, 0.3)}, {"ball": (9.0, 5.0)}, {"temperature": 3.0}]
)
def test_a_fixed_classifier_has_a_tight_bound(settings):
    """The objective is convex in H, so a descent over H alone finds the optimum."""
    objective = ncjax.Objective(**settings, fixed_classifier=True)
    start = sine_params()
    if "ball" in settings:
        start = on_norms(start, 9, 5)
    fn = objective.on_boundary if "ball" in settings else objective

    @jax.jit
    def of_features(h):
        def value(h):
            return fn(start._replace(H=h.reshape(start.H.shape)))

        return jax.value_and_grad(value)(h)

    run = descend(of_features, np.asarray(start.H).ravel(), gtol=1e-10)
    H = jnp.asarray(run.x).reshape(start.H.shape)
    best = start._replace(H=H)
    if "ball" in settings:
        best = best._replace(H=on_norms(best, 9, 5).H)
    found = ncjax.certificate(best, objective)
    assert abs(found.gap) < 1e-6 * found.value
    assert words(found) == "globally optimal point"
    assert ncjax.certificate(start, objective).bound <= found.value * (1 + 1e-12)


# Saddles


@jax.jit
def hessian(objective, params, weights):
    """The Hessian, on a ball the Riemannian one."""
    fn = objective if objective.ball is None else objective.on_boundary
    z, unflatten = ravel_pytree(params)
    slope = jax.grad(lambda z: fn(unflatten(z), weights))
    return jax.vmap(lambda v: jax.jvp(slope, (z,), (v,))[1])(jnp.eye(len(z)))


def hessian_along(objective, params, direction, weights=None):
    """The least eigenvalue of the Hessian, and its quotient in a direction."""
    v, _ = ravel_pytree(direction)
    second = np.asarray(hessian(objective, params, weights))
    return np.linalg.eigvalsh(second)[0], v @ second @ v


def block_point(mu, ratio, num_blocks, block_size, per_class, dim):
    """A critical point of cross entropy with decay: blocks, each collapsed."""
    K, b = num_blocks * block_size, block_size

    def excess(c):
        total = np.exp(c * (1 - 1 / b)) + (b - 1) * np.exp(-c / b) + K - b
        return per_class**0.5 * (b * np.exp(-c / b) + K - b) / total - mu

    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    blocks = ncjax.block_saddle(num_blocks, block_size, per_class, dim)
    own = jnp.einsum("kid,kd->ki", blocks.H, blocks.W)[0, 0]
    within = jnp.einsum("id,d->i", blocks.H[0], blocks.W[1])[0]
    scale = (low / (own - within)) ** 0.5
    sizes = [jnp.linalg.norm(leaf) for leaf in blocks]
    even = (sizes[1] / sizes[0]) ** 0.5 * scale  # equal norms first
    return ncjax.Params(blocks.W * even * ratio, blocks.H * scale**2 / even / ratio)


@pytest.mark.parametrize(
    ("decay", "sizes", "eigenvalue", "value"),
    [
        ((0.1, 0.1), (2, 2, 1), -0.09, 1.58812194677),
        ((0.2, 0.2), (2, 2, 3), -0.176905989232, 5.29654423934),
        ((0.05, 0.2), (3, 2, 1), -0.0408955364654, None),
    ],
)
def test_at_a_block_saddle_the_direction_has_the_least_eigenvalue(
    decay, sizes, eigenvalue, value
):
    ratio = (decay[1] / decay[0]) ** 0.25
    W, H = block_point(np.prod(decay) ** 0.5, ratio, *sizes, D)
    weights = jnp.broadcast_to(jnp.arange(N) < H.shape[1], (len(W), N)).astype(H.dtype)
    params = ncjax.Params(W, jnp.repeat(H[:, :1], N, axis=1) * weights[..., None])
    objective = ncjax.Objective(weight_decay=decay)
    found = ncjax.certificate(params, objective, weights=weights)
    assert words(found) == "strict saddle point"
    assert found.residual < 1e-12
    if value is not None:
        np.testing.assert_allclose(found.value, value, rtol=1e-11)
    np.testing.assert_allclose(ncjax.squared_norm(found.direction), 1, rtol=1e-12)
    least, second = hessian_along(objective, params, found.direction, weights)
    np.testing.assert_allclose(second, eigenvalue, rtol=1e-10)
    if decay[0] == decay[1]:
        np.testing.assert_allclose(second, found.mu - found.sigma_max, rtol=1e-10)
    np.testing.assert_allclose(least, second, rtol=1e-9)
    moved = jax.tree.map(lambda z, v: z + 0.1 * v, params, found.direction)
    assert objective(moved, weights) < found.value - 0.4 * abs(second) * 0.01


def test_at_a_saddle_of_the_ball_the_direction_descends_on_the_boundary():
    objective = ncjax.Objective(ball=(6.0, 3.0))
    params = on_norms(ncjax.block_saddle(2, 2, 3, 6), 6, 3)
    found = ncjax.certificate(params, objective)
    assert words(found) == "strict saddle point"
    least, second = hessian_along(objective, params, found.direction)
    assert second < 0
    np.testing.assert_allclose(second, least, rtol=1e-9)


def test_the_limit_of_a_start_of_low_rank_is_a_saddle():
    """The reference start spans four directions, and minimisation keeps the span."""
    k, i, j = np.arange(7)[:, None, None], np.arange(3)[None, :, None], np.arange(8)
    W = 0.3 * np.sin(1 + 3 * k[:, 0] + 7 * j)
    H = 0.3 * np.cos(2 + 5 * k + 11 * i + 13 * j)
    frame = np.linalg.svd(np.concatenate([W, H.reshape(-1, 8)]))[2][:4]
    model = Model((7, 3, 4), decay=(0.5, 0.5))
    z = np.concatenate([(W @ frame.T).ravel(), (H @ frame.T).ravel()])
    limit = point(descend(model.value_and_grad, z, gtol=1e-9).x, model)
    params = ncjax.Params(limit.W @ frame, limit.H @ frame)
    found = ncjax.certificate(params, ncjax.Objective(weight_decay=(0.5, 0.5)))
    assert words(found) == "strict saddle point"
    assert found.sigma_max > 1.2 * found.mu


def test_without_room_for_the_frame_the_descent_needs_a_larger_dim():
    """Two of three directions of squared error fit into d = 2."""
    mu = 0.3
    W = (2**0.5 - mu) ** 0.5 * jnp.eye(3, 2)
    H = jnp.repeat((W / 2**0.5)[:, None], 2, axis=1)
    objective = ncjax.Objective("squared_error", weight_decay=(mu, mu))
    found = ncjax.certificate(ncjax.Params(W, H), objective)
    assert int(found.verdict) == certificates.NO_ROOM
    assert jnp.isnan(found.direction.W).all()
    np.testing.assert_allclose(found.sigma_max, 2**0.5, rtol=1e-12)


# Calls


def test_under_jit_and_vmap_numbers_and_points_may_vary():
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), sine_params())

    @jax.jit
    @jax.vmap
    def bounds(params, decay):
        objective = ncjax.Objective(weight_decay=(decay, decay))
        return ncjax.certificate(params, objective).bound

    got = bounds(starts, jnp.asarray([0.1, 0.3]))
    for k, decay in enumerate((0.1, 0.3)):
        start = jax.tree.map(lambda leaf, k=k: leaf[k], starts)
        objective = ncjax.Objective(weight_decay=(decay, decay))
        right = ncjax.certificate(start, objective).bound
        np.testing.assert_allclose(got[k], right, rtol=1e-12)


def test_a_traced_decay_of_the_bias_may_be_zero():
    """A free bias is not recognised there; the bound is the least loss, not NaN."""
    point = with_bias(sine_params(), 0.3 * np.cos(np.arange(4)))

    @jax.jit
    @jax.vmap
    def bounds(decay):
        objective = ncjax.Objective(weight_decay=(0.1, 0.1), bias=decay)
        return ncjax.certificate(point, objective).bound

    got = bounds(jnp.asarray([0.0, 0.5]))
    np.testing.assert_allclose(got, [0, 2.587524811657], rtol=1e-10)


def test_half_precision_is_certified_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sine_params())
    found = ncjax.certificate(params, ncjax.Objective(weight_decay=(0.1, 0.1)))
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(found))
    np.testing.assert_allclose(found.bound, 2.6237, rtol=1e-2)


def test_without_an_objective_it_is_the_certificate_of_a_direction():
    params = collapse(30.0)
    found = ncjax.certificate(params, multipliers="nnls", tol=1e-6)
    right = ncjax.separation.certificate(params, multipliers="nnls", tol=1e-6)
    np.testing.assert_array_equal(found.sigma_max, right.sigma_max)
    assert isinstance(found, ncjax.Certificate)


def custom(logits, labels):
    return logits[:, 0]


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, r"needs weight_decay, ball or temperature.*certificate\(params\) without"),
        ({"weight_decay": (0.1, 0.0)}, {}, "weight_decay must be positive for a bound"),
        ({"loss": custom, "ball": (1, 1)}, {}, "a lower bound is known for cross_entropy"),
        ({"ball": (1, 1)}, {"tol": -1}, "tol must be finite and not negative, got -1"),
        ({"ball": (1, 1)}, {"multipliers": "nnls"}, "multipliers are for a certificate"),
        (
            {"loss": "focal", "gamma": 2, "ball": (1, 1)},
            {"weights": [1, 1, 1, 2]},
            "the focal loss has a bound for balanced classes alone",
        ),
        ({"ball": (1, 1), "bias": 0.0}, {}, "expected ncjax.BiasedParams"),
    ],
)
def test_errors_say_in_one_line_what_to_do(settings, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        ncjax.certificate(sine_params(), ncjax.Objective(**settings), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", [jnp.ones((K, N)), "cross_entropy"])
def test_only_an_objective_is_an_objective(objective):
    with pytest.raises(ValueError, match="objective must be an ncjax"):
        ncjax.certificate(sine_params(), objective)
    with pytest.raises(ValueError, match="objective must be an ncjax"):
        ncjax.gradient_flow(sine_params(), [1.0], objective=objective)


def test_a_point_with_nan_is_refused():
    params = sine_params()
    params = params._replace(W=np.full((K, D), np.nan))
    with pytest.raises(ValueError, match="W must be finite"):
        ncjax.certificate(params, ncjax.Objective(ball=(1, 1)))
