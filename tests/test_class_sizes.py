"""Classes of any size and weights of samples: losses, flow, optimality, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from state_functions import certificate, kkt
from strategies import random_params, seeds, separating, sine_params

import ncjax
from ncjax import losses
from ncjax.flow import block_solve, steps
from ncjax.flow.methods import choose_solver
from ncjax.flow.solve import SUCCESS
from ncjax.peeled import kernels
from ncjax.peeled.logits import log_odds_of_error, margins_of_params
from ncjax.peeled.separation import GLOBAL_OPTIMUM

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (4, 3, 6)
COUNTS = (4, 4, 1, 1)
# n_k = (4, 4, 1, 1), d = 6. t: L, q_min, |Z|², W[0, 0], H[0, 0, 0]; raw equation in t.
EARLY = {
    1: (8.1436499085, -0.157677976139, 10.8853286472, 0.484380146749, 0.129642513893),
    10: (0.0911705180638, 4.14534425679, 66.4153896148, 0.930606168598, 0.342198548101),
    100: (0.00338107209042, 7.65256741937, 97.3234462225, 1.02135110337, 0.37249018125),
    1e3: (2.26900283849e-4, 10.4268875329, 121.61579243, 1.0840333028, 0.400284104389),
    1e5: (1.44568439188e-6, 15.5830084291, 166.171198293, 1.19030788644, 0.46055058396),
}
# log(1 + t): log L, |Z|²; from the clock.
LATE = {
    100.0: (-103.836177472, 982.041479),
    1000.0: (-1006.087344019, 9248.70731),
    1e4: (-10008.382610700, 91730.2353),
}


def random_weights(seed, num_classes=4, per_class=3):
    """Draw positive weights and zeros, with a positive one for every class."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(num_classes, per_class))
    kept = rng.random(weights.shape) < 0.6
    kept[np.arange(num_classes), rng.integers(0, per_class, num_classes)] = True
    return jnp.asarray(np.where(kept, weights, 0))


def without_left_out(params, weights):
    """H with zeros for the samples of weight 0."""
    return params._replace(H=jnp.where(weights[..., None] > 0, params.H, 0))


# Losses.


@jax.jit
def losses_of(params, weights, gamma):
    """Logarithms of both losses with gradients, and the slopes of both."""
    point = without_left_out(params, weights)
    return (
        jax.value_and_grad(ncjax.log_cross_entropy)(params, weights),
        jax.value_and_grad(lambda p: kernels.log_loss(p, weights, gamma))(point),
        ncjax.cross_entropy(params, weights),
        losses.error_slopes(params, weights),
        kernels.error_slopes(point, weights, gamma),
    )


@given(seeds, st.sampled_from([0.1, 1.0, 40.0]), st.sampled_from([0.0, 0.5, 2.0]))
def test_weighted_losses_and_slopes_agree_with_loops(seed, scale, gamma):
    params, weights = random_params(seed, *SHAPE, scale), random_weights(seed)
    plain, focal, loss, *slopes = losses_of(params, weights, gamma)
    W, H = (np.asarray(leaf) for leaf in params)
    H = np.where(np.asarray(weights)[..., None] > 0, H, 0)
    for gradient_of, g, (log_loss, P, _) in zip(
        (plain, focal), (0, gamma), slopes, strict=True
    ):
        exact, dW, dH = oracles.log_cross_entropy_and_gradient(W, H, weights, g)
        assert float(gradient_of[0]) == pytest.approx(float(exact), rel=1e-11, abs=1e-11)
        assert float(log_loss) == pytest.approx(float(exact), rel=1e-11, abs=1e-11)
        by_slopes = np.einsum("kij,kid->jd", P, H), np.einsum("kij,jd->kid", P, W)
        for pair in (gradient_of[1], by_slopes):
            for got, want in zip(pair, (dW, dH), strict=True):
                rounding = 1e-9 * float(np.abs(want).max())
                np.testing.assert_allclose(got, want.astype(float), atol=rounding)
        if g == 0:
            assert float(loss) == pytest.approx(float(np.exp(exact)), rel=1e-9)


def test_integer_weights_repeat_samples_and_class_weights_are_the_same_for_a_class():
    params = random_params(1, *SHAPE, 1.0)
    counts = np.array([[2, 1, 3], [1, 4, 1], [3, 2, 1], [2, 2, 2]])
    rows = [params.H[k, np.repeat(np.arange(3), counts[k])] for k in range(4)]
    repeated = ncjax.Params(params.W, jnp.stack(rows))
    for loss in (ncjax.cross_entropy, ncjax.log_cross_entropy):
        np.testing.assert_allclose(loss(params, counts), loss(repeated), rtol=1e-13)
        by_class = np.arange(1.0, 5)
        np.testing.assert_allclose(
            loss(params, by_class), loss(params, by_class[:, None].repeat(3, 1)), rtol=1e-15
        )


def test_without_weights_the_programs_are_the_unweighted_formulas():
    params = random_params(0, *SHAPE, 1.0)

    def odds(p):
        return log_odds_of_error(*margins_of_params(p))

    formulas = {
        kernels.cross_entropy: lambda p: jnp.sum(jax.nn.softplus(odds(p))),
        kernels.log_loss: lambda p: jax.nn.logsumexp(kernels.log_softplus(odds(p))),
    }
    for function, formula in formulas.items():
        assert str(jax.make_jaxpr(function)(params)) == str(jax.make_jaxpr(formula)(params))


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_the_linear_solve_has_the_hessian_of_the_weighted_loss(scale):
    weights = random_weights(3)
    params = without_left_out(random_params(0, *SHAPE, 0.7), weights)
    params = jax.tree.map(lambda leaf: scale**0.5 * leaf, params)
    right = random_params(1, *SHAPE, 1.0)

    @jax.jit
    def residual(c):
        slopes = kernels.error_slopes(params, weights)
        X = block_solve.solve(block_solve.factor(params, slopes, c, weights), right)

        def operator(v):  # ∇²L / L = ∇² log L + ∇log L (∇log L)ᵀ
            slope, curved = jax.jvp(
                jax.grad(lambda p: kernels.log_loss(p, weights)), (params,), (v,)
            )
            along = sum(jnp.sum(g * leaf) for g, leaf in zip(slope, v, strict=True))
            return jax.tree.map(lambda h, g: h + along * g, curved, slope)

        return jax.tree.map(lambda x, a, r: x + c * a - r, X, operator(X), right)

    for leaf in residual(0.05):
        np.testing.assert_allclose(leaf, 0, atol=1e-11)


# The flow.


@jax.jit
def implicit(params, weights, log_times, rtol):
    """The implicit solver at five times, compiled once per shape."""
    return ncjax.gradient_flow(
        params, log_times, weights=weights, rtol=rtol, atol=rtol, solver="implicit"
    )


def summary(flow, weights):
    """L, q_min, |Z|², W[0, 0] and H[0, 0, 0] at each time."""
    least = jax.vmap(lambda p: ncjax.margins(p, weights).min())(flow.params)
    norms = jax.vmap(ncjax.squared_norm)(flow.params)
    first = flow.params.W[:, 0, 0], flow.params.H[:, 0, 0, 0]
    return np.stack([jnp.exp(flow.log_loss), least, norms, *first], axis=-1)


def test_the_reference_flow_of_unequal_classes():
    start, weights = sine_params(per_class=4), ncjax.sample_weights(COUNTS)
    times = np.log(list(EARLY))
    early = implicit(start, weights, times, 1e-11)
    np.testing.assert_allclose(summary(early, weights), list(EARLY.values()), rtol=2e-9)
    assert not early.params.H[:, 2:, 1:].any()
    flow = implicit(start, weights, np.array([*LATE, 1e5, 1e6]), 1e-10)
    norms = np.asarray(jax.vmap(ncjax.squared_norm)(flow.params))
    got = np.stack([flow.log_loss, norms], axis=-1)[:3]
    np.testing.assert_allclose(got, list(LATE.values()), rtol=1e-9)
    value, log_t = ncjax.separation_value(COUNTS), np.asarray(flow.log_times)
    assert norms[2] / 1e4 == pytest.approx(9.1730, abs=5e-5)
    rates = np.exp(np.asarray(flow.log_loss) + log_t) * log_t
    assert rates[2] == pytest.approx(2.28812, abs=5e-6)
    margins = np.asarray(jax.vmap(lambda p: ncjax.margins(p, weights))(flow.params))
    excess = margins - margins.min(axis=(1, 2, 3), keepdims=True)
    pairs = excess[:, [0, 0, 2], 0, [1, 2, 0]]
    np.testing.assert_allclose(pairs[2], [1.314317, 0.771256, 0.771388], atol=1e-6)
    multipliers = np.asarray(ncjax.solve_separation(COUNTS, 6).multipliers)[:, 0]
    limits = np.log(multipliers.max() / multipliers[[0, 0, 2], [1, 2, 0]])
    np.testing.assert_allclose(pairs[4], limits, atol=1e-5)
    # At log t = 1e6 the point is the optimum to the rate 1 / log t, and is certified.
    assert norms[4] / 1e6 == pytest.approx(2 * value, rel=3e-5)
    assert rates[4] == pytest.approx(value / 2, rel=3e-5)
    wrong = np.exp(-excess[[2, 4]]).sum(axis=-1)  # in proportion to the losses
    shares = wrong.sum(axis=-1) / wrong.sum(axis=(1, 2))[:, None]
    counts = np.array(COUNTS)
    exact = counts * multipliers.sum(axis=1) / value
    np.testing.assert_allclose(exact[[0, 2]], [0.3563427, 0.1436573], atol=1e-7)
    np.testing.assert_allclose(shares[0, [0, 2]], [0.3563374, 0.1436626], atol=2e-7)
    np.testing.assert_allclose(shares[1], exact, atol=1e-6)
    proof = certificate(flow.final, weights=weights)
    assert int(proof.verdict) == GLOBAL_OPTIMUM
    assert float(proof.sigma_max) == pytest.approx(1, abs=1e-6)
    assert float(proof.bound) <= value
    assert float(proof.gap) < 2e-6


@pytest.mark.slow
def test_class_weights_move_margins_by_their_logarithms():
    start = sine_params(num_classes=3, per_class=2)
    by_class = jnp.array([4.0, 1.0, 1.0])
    flow = implicit(start, by_class, np.array([1.0, 10.0, 1e2, 1e3, 1e4]), 1e-10)
    margins = np.asarray(ncjax.margins(flow.final))
    assert margins[0, 0, 1] - margins[1, 0, 0] == pytest.approx(1.3864329, abs=1e-7)


def test_the_flow_is_the_raw_equation_of_the_samples_of_positive_weight():
    """Left-out samples in any place, of any features, and other weights."""
    params, weights = random_params(5, 4, 4, 6, 0.3), random_weights(5, 4, 4)
    times = np.array([0.1, 1.0, 7.0, 20.0, 30.0])
    kept = np.asarray(weights) > 0

    def field(_t, flat):
        W, H = flat[:24].reshape(4, 6), np.zeros((4, 4, 6))
        H[kept] = flat[24:].reshape(-1, 6)
        log_loss, dW, dH = oracles.log_cross_entropy_and_gradient(W, H, weights)
        return -np.exp(log_loss) * np.append(dW.ravel(), dH[kept].ravel()).astype(float)

    start = np.append(np.ravel(params.W), np.asarray(params.H)[kept].ravel())
    raw = solve_ivp(field, (0, 30), start, "DOP853", times, rtol=1e-9, atol=1e-11)
    far = params._replace(H=jnp.where(jnp.asarray(kept)[..., None], params.H, 1e3))
    flow = implicit(far, weights, np.log(times), 1e-10)
    np.testing.assert_allclose(flow.params.W.reshape(5, -1), raw.y[:24].T, atol=1e-7)
    H = np.asarray(flow.params.H)
    np.testing.assert_allclose(H[:, kept].reshape(5, -1), raw.y[24:].T, atol=1e-7)
    assert not H[:, ~kept].any()


def test_the_explicit_flow_maps_over_starts_and_takes_the_steps_of_the_samples_kept():
    """The second start has its samples in other places of H."""
    start, times = sine_params(per_class=4), np.log(list(EARLY))
    moved = start._replace(H=start.H.at[2:].set(jnp.roll(start.H[2:], 2, axis=1)))
    weights = ncjax.sample_weights(COUNTS)
    both = jax.tree.map(lambda *x: jnp.stack(x), start, moved)
    each = jnp.stack([weights, jnp.roll(weights, 2, axis=1).at[:2].set(1)])

    @jax.jit
    def explicit(starts, weights):
        def one(start, weights):
            return ncjax.gradient_flow(
                start, times, weights=weights, rtol=1e-11, atol=1e-11, solver="explicit"
            )

        return jax.vmap(one)(starts, weights)

    flow = explicit(both, each)
    one, other = (jax.tree.map(lambda leaf, i=i: leaf[i], flow) for i in range(2))
    np.testing.assert_allclose(summary(one, weights), list(EARLY.values()), rtol=2e-9)
    np.testing.assert_allclose(other.params.W, one.params.W, rtol=1e-10)
    assert int(one.num_steps) == int(other.num_steps)


def test_entries_left_out_loosen_no_tolerance():
    params, weights = sine_params(), jnp.ones((4, 3)).at[:, 1:].set(0)
    few = params._replace(H=params.H[:, :1])
    share = steps._share_of_entries(params, weights)
    assert float(share) == pytest.approx(few_entries(few) / few_entries(params))
    kept = without_left_out(params, weights)
    absolute = steps._absolute_tolerance(kept, 1e-8, share)
    assert float(absolute) == pytest.approx(
        float(steps._absolute_tolerance(few, 1e-8, None)), rel=1e-14
    )


def few_entries(params):
    return sum(leaf.size for leaf in params)


def test_starts_of_unequal_classes_and_gradient_descent(key):
    start = ncjax.init_params(key, 3, (2, 1, 2), 4)
    assert not start.H[1, 1].any()
    assert np.asarray(start.H)[[0, 2]].all()
    weights = ncjax.sample_weights((2, 1, 2))
    descent = ncjax.gradient_descent(start, 0.1, 3, weights=weights, save_steps=[3])
    state = [np.asarray(leaf, np.longdouble) for leaf in start]
    for _ in range(3):
        log_loss, *slope = oracles.log_cross_entropy_and_gradient(*state, weights)
        state = [z - 0.1 * np.exp(log_loss) * g for z, g in zip(state, slope, strict=True)]
    for got, exact in zip(descent.final, state, strict=True):
        np.testing.assert_allclose(got, exact.astype(float), rtol=1e-12, atol=1e-15)
    log_loss, *_ = oracles.log_cross_entropy_and_gradient(*state, weights)
    assert float(descent.log_loss[0]) == pytest.approx(float(log_loss), rel=1e-12)


def test_the_focal_loss_on_the_clock():
    """On the ray of collapse, which the flow does not leave; its norm forgets the start."""
    objective = ncjax.Objective("focal", gamma=2)
    collapse = ncjax.solve_separation((3, 3, 3, 3), 3)
    size = (9.9e4 / 3) ** 0.5  # |Z|²/2 tends to v log t / 3
    start = jax.tree.map(lambda leaf: size * leaf, collapse.params)
    flow = ncjax.gradient_flow(
        start,
        [1e5],
        objective=objective,
        start_log_time=9.9e4,
        rtol=1e-11,
        solver="stabilised",
    )
    assert int(flow.result) == SUCCESS
    assert float(ncjax.squared_norm(flow.final)) / 1e5 == pytest.approx(3.464706, abs=1e-6)
    rate = np.exp(float(flow.log_loss[0]) + 1e5) * 1e5
    assert rate == pytest.approx(0.865883, abs=1e-6)
    assert choose_solver(4, 3, 1e9, np.float64, focal=True) != "implicit"


# Optimality and metrics.


@pytest.mark.parametrize("counts", [(3, 2, 1, 1), (3, 3, 2, 1), (3, 1, 3, 2)], ids=str)
def test_the_optimum_has_no_residual_and_no_gap(counts):
    solution = ncjax.solve_separation(counts, 6)
    params, weights = solution.params, solution.weights
    found = kkt(params, weights, multipliers="nnls")
    assert float(found.stationarity) < 1e-13
    assert abs(float(found.complementarity)) < 1e-13
    np.testing.assert_allclose(found.multipliers, solution.multipliers, atol=1e-12)
    proof = certificate(params, weights=weights, multipliers="nnls")
    assert int(proof.verdict) == GLOBAL_OPTIMUM
    assert float(proof.bound) == pytest.approx(solution.value, rel=1e-12)
    assert abs(float(proof.gap)) < 1e-12
    assert abs(float(proof.excess)) < 1e-12
    assert float(ncjax.margin_ratio(params, weights)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("multipliers", ["softmax", "nnls"])
def test_weights_of_zero_leave_samples_out_of_kkt_and_certificate(multipliers):
    for seed in range(3):
        params, weights = separating(seed, *SHAPE), random_weights(seed)
        # A sample left out may be misclassified.
        bad = jnp.where(weights[..., None] > 0, params.H, -9.0)
        found = kkt(params._replace(H=bad), weights, multipliers=multipliers)
        multiplier = np.asarray(found.multipliers)
        assert not multiplier[np.asarray(weights) == 0].any()
        dropped = _dropped(params, weights, multiplier)
        tangent, slack = oracles.tangent_and_slack_of_samples(*dropped)
        assert float(found.stationarity) == pytest.approx(tangent, rel=1e-9)
        assert float(found.complementarity) == pytest.approx(slack, rel=1e-9, abs=1e-12)
        proof = certificate(
            params._replace(H=bad), weights=weights, multipliers=multipliers
        )
        counts = np.sum(np.asarray(weights) > 0, axis=1)
        value = ncjax.separation_value(counts)
        assert float(proof.bound) <= value * (1 + 1e-12)
        margins = np.asarray(ncjax.margins(params, weights))
        kept = np.asarray(weights) > 0
        assert np.isinf(margins[~kept]).all()
        half = sum(np.sum(np.asarray(x) ** 2) for x in (params.W, params.H[kept])) / 2
        assert float(proof.excess) == pytest.approx(half / margins.min() / value - 1)
        ratio = float(ncjax.margin_ratio(params._replace(H=bad), weights))
        assert ratio == pytest.approx(1 / (1 + float(proof.excess)), rel=1e-12)
        if multipliers == "softmax":
            angle = float(ncjax.kkt_angle(params._replace(H=bad), weights))
            assert float(found.stationarity) == pytest.approx(angle, rel=1e-9)


def _dropped(params, weights, multipliers):
    """W, features (N, d), labels (N,) and multipliers (N, K) of the samples kept."""
    kept = np.asarray(weights) > 0
    labels = np.nonzero(kept)[0]
    return np.asarray(params.W), np.asarray(params.H)[kept], labels, multipliers[kept]


@given(seeds)
def test_metrics_are_the_metrics_of_the_samples_of_positive_weight(seed):
    params, weights = random_params(seed, *SHAPE, 1.0), random_weights(seed)
    W, features, labels, _ = _dropped(params, weights, np.zeros((*SHAPE[:2], 4)))
    data = oracles.Data(features=features, labels=labels, W=W, b=np.zeros(4))
    exact = oracles.metrics_of_present(data, 1)
    far = jnp.where(weights[..., None] > 0, params.H, 1e6)
    found = _metrics(params._replace(H=far), weights)._asdict()
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)


_metrics = jax.jit(ncjax.collapse_metrics)


# Bad input.


@pytest.mark.parametrize(
    "function",
    [
        ncjax.cross_entropy,
        ncjax.margin_ratio,
        ncjax.kkt,
        ncjax.kkt_angle,
        ncjax.collapse_metrics,
        lambda params, weights: ncjax.gradient_flow(params, [1.0], weights=weights),
        lambda params, weights: ncjax.gradient_descent(params, 0.1, 1, weights=weights),
    ],
)
def test_bad_weights_are_named(function):
    params = separating(0, *SHAPE)
    with pytest.raises(ValueError, match=r"weights must have shape \(K, n\) = \(4, 3\)"):
        function(params, np.ones((4, 2)))
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        function(params, np.array([1.0, -1, 1, 1]))
    with pytest.raises(ValueError, match="got none for class 2"):
        function(params, np.array([1.0, 1, 0, 1]))


@pytest.mark.parametrize(
    "settings",
    [{"weight_decay": (0.1, 0.1)}, {"bias": 0.0}, {"smoothing": 0.1}, {"ball": (1.0, 2.0)}],
    ids=str,
)
def test_regularised_objectives_are_refused_on_the_log_clock(settings):
    objective = ncjax.Objective("cross_entropy", **settings)
    with pytest.raises(ValueError, match=r"log_times need the .* alone, got .* pass plain"):
        ncjax.gradient_flow(sine_params(), [1.0], objective=objective)


def test_the_implicit_solver_refuses_the_focal_loss():
    focal = ncjax.Objective("focal", gamma=2)
    with pytest.raises(ValueError, match='"implicit" has the Hessian of the cross entropy'):
        ncjax.gradient_flow(sine_params(), [1.0], objective=focal, solver="implicit")


@pytest.mark.parametrize(
    ("per_class", "message"),
    [
        ((2, 1), "a count for each of num_classes = 3 classes, got 2 counts"),
        ((2, 0, 1), "counts must be an integer of at least 1, got 0"),
    ],
)
def test_bad_counts_of_a_start_are_named(key, per_class, message):
    with pytest.raises(ValueError, match=message):
        ncjax.init_params(key, 3, per_class, 4)
