import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_params, sizes

import ncjax
from ncjax.peeled.losses import error_slopes, log_softplus, softmax_cross_entropy


@given(st.integers(0, 10**6), sizes, st.sampled_from([1e-8, 0.1, 1.0, 3.0]))
def test_cross_entropy_is_the_sum_over_samples(seed, shape, scale):
    params = random_params(seed, *shape, scale)
    truth = oracles.ulpm_cross_entropy(np.asarray(params.W), np.asarray(params.H))
    np.testing.assert_allclose(ncjax.cross_entropy(params), truth, rtol=1e-12)
    np.testing.assert_allclose(
        ncjax.log_cross_entropy(params), np.log(truth), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fn", [ncjax.cross_entropy, ncjax.log_cross_entropy])
def test_value_and_gradient_at_the_origin(fn, dtype):
    params = random_params(0, 5, 3, 4, 0.0, dtype)
    expected = 15 * np.log(5)
    expected = expected if fn is ncjax.cross_entropy else np.log(expected)
    value, gradient = jax.value_and_grad(fn)(params)
    assert value.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=4 * np.finfo(dtype).eps)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", [1.0, 1e2, 1e3, 1e4])
def test_value_and_gradient_at_large_norm_agree_with_extended_precision(dtype, norm):
    # A near-collapsed point with margins up to 1e8: a loss down to exp(-1e6) and beyond.
    rng = np.random.default_rng(0)
    etf = np.asarray(ncjax.simplex_etf(4, 5))
    W = (norm * (etf + 0.01 * rng.normal(size=etf.shape))).astype(dtype)
    H = (norm * (etf[:, None] + 0.01 * rng.normal(size=(4, 3, 5)))).astype(dtype)
    value, gradient = jax.value_and_grad(ncjax.log_cross_entropy)(
        ncjax.Params(jnp.asarray(W), jnp.asarray(H))
    )
    truth, truth_W, truth_H = oracles.log_cross_entropy_and_gradient(W, H)
    eps = np.finfo(dtype).eps
    # Rounding of a margin m is eps |w| |h|, and moves log L by that much, the weights by
    # that share of themselves.
    rounding = 20 * eps * max(1.0, norm**2)
    np.testing.assert_allclose(value, truth, rtol=0, atol=rounding)
    if rounding < 1e-2:
        for got, expected in ((gradient.W, truth_W), (gradient.H, truth_H)):
            error = np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected)
            assert error < 2 * rounding + 20 * eps
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradient_at_a_loss_of_exp_of_minus_a_million_is_the_direction(dtype):
    # Exactly collapsed: margins are all equal, so is every weight, and the gradient of
    # log L is that of minus the mean margin, whatever the norm.
    etf = ncjax.simplex_etf(4, 4, dtype=dtype)
    far = ncjax.Params(1e3 * etf, 1e3 * etf[:, None])
    value, gradient = jax.value_and_grad(ncjax.log_cross_entropy)(far)
    margin = 1e6 * 4 / 3
    np.testing.assert_allclose(value, np.log(12) - margin, rtol=4 * np.finfo(dtype).eps)
    # Sum over j of (w_k - w_j) / (K - 1) is K / (K - 1) w_k; a quarter of it per sample.
    tolerance = 1e-9 if dtype == np.float64 else 0.3
    np.testing.assert_allclose(gradient.H[:, 0], -1e3 * etf / 3, rtol=tolerance, atol=1e-3)


def test_loss_of_misclassified_samples_at_large_norm_is_linear_in_the_margin():
    etf = ncjax.simplex_etf(3, 3)
    wrong = ncjax.Params(1e3 * etf, -1e3 * etf[:, None])
    value, gradient = jax.value_and_grad(ncjax.cross_entropy)(wrong)
    np.testing.assert_allclose(value, 3 * (1.5e6 + np.log(2)), rtol=1e-12)
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_allclose(ncjax.log_cross_entropy(wrong), np.log(value), rtol=1e-14)


@jax.jit
def _gradients(params):
    loss, gradient = jax.value_and_grad(ncjax.cross_entropy)(params)
    return loss, gradient, jax.grad(ncjax.log_cross_entropy)(params)


@given(st.integers(0, 10**6), sizes, st.sampled_from([0.1, 1.0, 3.0]))
def test_gradient_of_the_log_loss_is_the_gradient_over_the_loss(seed, shape, scale):
    params = random_params(seed, *shape, scale)
    loss, gradient, log_gradient = _gradients(params)
    expected = jax.tree.map(lambda leaf: leaf / loss, gradient)
    chex.assert_trees_all_close(log_gradient, expected, rtol=1e-10, atol=1e-13)


def test_second_derivatives_agree_with_differences(key):
    params = random_params(3, 3, 2, 4, 1.0)
    direction = random_params(4, 3, 2, 4, 1.0)
    step = 1e-5

    def gradient(at):
        shifted = jax.tree.map(lambda z, v: z + at * v, params, direction)
        return jax.grad(ncjax.log_cross_entropy)(shifted)

    _, product = jax.jvp(gradient, (0.0,), (1.0,))
    expected = jax.tree.map(
        lambda ahead, behind: (ahead - behind) / (2 * step), gradient(step), gradient(-step)
    )
    chex.assert_trees_all_close(product, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_softplus_and_its_derivative_over_the_whole_line(dtype):
    a = np.concatenate(
        [-np.logspace(7, -7, 57), [0.0], np.logspace(-7, 7, 57), [-30.1, -29.9]]
    ).astype(dtype)
    value, slope = jax.vmap(jax.value_and_grad(log_softplus))(jnp.asarray(a))
    truth, truth_slope = oracles.log_softplus(a)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(value, truth, rtol=8 * eps, atol=8 * eps)
    np.testing.assert_allclose(slope, truth_slope, rtol=40 * eps)


def test_a_common_offset_of_the_classifier_costs_no_digits():
    params = random_params(0, 4, 3, 6, 1.0, np.float32)
    moved = params._replace(W=params.W + 1e4)
    exact = params._replace(W=(moved.W - moved.W[:1]))
    np.testing.assert_allclose(
        ncjax.log_cross_entropy(moved), ncjax.log_cross_entropy(exact), rtol=1e-6
    )


def test_vmap_agrees_with_a_loop():
    many = [random_params(seed, 3, 2, 4, 1.0) for seed in range(5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    together = jax.vmap(ncjax.log_cross_entropy)(stacked)
    np.testing.assert_allclose(together, [ncjax.log_cross_entropy(p) for p in many])


@pytest.mark.parametrize("fn", [ncjax.cross_entropy, ncjax.log_cross_entropy])
def test_mismatched_shapes_are_named(fn):
    with pytest.raises(ValueError, match=r"expected W \(K, d\) and H \(K, n, d\)"):
        fn(ncjax.Params(jnp.ones((3, 4)), jnp.ones((3, 4))))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_log_softplus_over_the_whole_line_of_half_precision_is_float32(dtype):
    a = jnp.concatenate([-jnp.geomspace(2e4, 1e-3, 400), jnp.linspace(0, 80, 50)])
    a = a.astype(dtype)
    value, slope = jax.vmap(jax.value_and_grad(log_softplus))(a)
    truth, truth_slope = oracles.log_softplus(np.asarray(a, float))
    assert value.dtype == jnp.float32
    assert slope.dtype == dtype
    np.testing.assert_allclose(value, truth, rtol=1e-6, atol=1e-6)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(slope, float), truth_slope, rtol=2 * eps)


@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 5, 300]),
    st.sampled_from(["uint8", "int8", "int64"]),
)
def test_loss_of_logits_agrees_with_loops(seed, num_classes, integer):
    rng = np.random.default_rng(seed)
    logits = 5 * rng.normal(size=(7, num_classes))
    labels = rng.integers(0, min(num_classes, 120), 7).astype(integer)
    got = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    expected = [
        np.log1p(sum(np.exp(z - row[y]) for j, z in enumerate(row) if j != y))
        for row, y in zip(logits, labels, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def by_loops(row, label):
    """Loss, gradient and Hessian in the logits, of which `-inf` ones are left out."""
    kept = [j for j, z in enumerate(row) if z > -np.inf]
    p = np.zeros(len(row), np.longdouble)
    highest = max(row[j] for j in kept)
    for j in kept:
        p[j] = np.exp(np.longdouble(row[j]) - highest)
    others = sum(p[j] for j in kept if j != label)
    loss = np.log1p(others / p[label])
    p = p / p.sum()
    gradient = p.copy()
    gradient[label] = -others / (others + np.exp(np.longdouble(row[label]) - highest))
    return loss, gradient, np.diag(p) - np.outer(p, p)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_logits_are_left_out_of_value_and_derivatives(dtype):
    inf = np.inf
    rows = [
        *([1.0, -inf, -inf, -inf], [1.0, 2.0, -inf, -1.0], [30.0, -inf, 0.0, -2.0]),
        *([-80.0, 3.0, -inf, 1.0], [80.0, -inf, -inf, 3.0], [0.5, 0.1, 0.0, -1.0]),
    ]
    eps = float(np.finfo(dtype).eps)
    for row in rows:
        row = np.asarray(row, dtype)
        found = _value_and_derivatives(jnp.asarray(row))
        for got, exact in zip(found, by_loops(row, 0), strict=True):
            np.testing.assert_allclose(got, exact.astype(float), rtol=100 * eps, atol=eps)
    loss = softmax_cross_entropy(
        np.asarray([[-inf, 1, 2], [-inf, -inf, 2]]), np.zeros(2, int)
    )
    np.testing.assert_array_equal(loss, inf)


@jax.jit
def _value_and_derivatives(row):
    def loss(row):
        return softmax_cross_entropy(row[None], jnp.zeros(1, jnp.int32))[0]

    return loss(row), jax.grad(loss)(row), jax.hessian(loss)(row)


@pytest.mark.parametrize(
    "labels",
    [[0, -1], [0, 3], np.array([0, 2**32 + 1]), np.array([0, 2**63 + 1], np.uint64)],
)
@pytest.mark.parametrize("x64", [True, False])
def test_labels_out_of_range_are_refused_and_are_nan_under_jit(labels, x64):
    with jax.enable_x64(x64):
        logits = jnp.zeros((2, 3), jnp.float32)
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got "):
            softmax_cross_entropy(logits, labels)
        if x64 or max(np.abs(np.asarray(labels, float))) < 9:
            loss = jax.jit(softmax_cross_entropy)(logits, jnp.asarray(labels))
            np.testing.assert_allclose(loss, [np.log(3), np.nan], rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), [0.0, 1.0], r"expected labels of integers \(2,\), got float64"),
        (
            np.zeros((2, 3)),
            [[0], [1]],
            r"expected labels of integers \(2,\), got int64 \(2, 1",
        ),
        (np.zeros(3), [0], r"expected logits \(N, K\) with K >= 2, got \(3,\)"),
        (np.zeros((2, 1)), [0, 0], r"expected logits \(N, K\) with K >= 2, got \(2, 1\)"),
        (np.zeros((2, 3), int), [0, 1], "logits must be floating, got int64"),
    ],
)
def test_bad_logits_and_labels_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(logits, labels)


_softplus_and_slope = jax.jit(jax.vmap(jax.value_and_grad(log_softplus)))


@given(
    st.lists(st.floats(-1e300, 1e300) | st.floats(-800, 800), min_size=8, max_size=8),
    st.sampled_from([np.float32, np.float64]),
)
def test_log_softplus_at_any_odds(odds, dtype):
    a = np.clip(odds, -np.finfo(dtype).max, np.finfo(dtype).max).astype(dtype)
    value, slope = _softplus_and_slope(jnp.asarray(a))
    exact, exact_slope = oracles.log_softplus(a)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(value, exact.astype(float), rtol=4 * eps, atol=4 * eps)
    # The slope is the exponential of log sigmoid - log softplus, of which it has the
    # rounding. Below the least normal number it may be 0.
    tiny = float(np.finfo(dtype).tiny)
    log_slope = np.log(np.maximum(exact_slope, tiny))
    rounding = 4 * eps * (1 + np.abs(exact) + np.abs(log_slope))
    gap = np.abs(np.asarray(slope, np.longdouble) - exact_slope)
    assert (gap <= rounding * exact_slope + 2 * tiny).all()


@given(
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 30.0, 1000.0]),
    st.sampled_from([np.float32, np.float64]),
)
def test_error_slopes_sum_to_zero_and_give_the_gradient(seed, scale, dtype):
    params = random_params(seed, 3, 2, 7, scale, dtype)
    slopes = _slopes(params)
    assert {leaf.dtype for leaf in slopes} == {np.dtype(dtype)}
    P = np.asarray(slopes.P, np.longdouble)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(P.sum(axis=-1), 0, atol=10 * eps * np.abs(P).max())
    assert (P[~np.eye(3, dtype=bool)[:, None].repeat(2, 1)] >= 0).all()
    W, H = (np.asarray(leaf, np.longdouble) for leaf in params)
    log_loss, dW, dH = oracles.log_cross_entropy_and_gradient(W, H)
    # A margin rounds at eps |w| |h|, the weights by that share of themselves.
    largest = [float(np.linalg.norm(leaf, axis=-1).max()) for leaf in (W, H)]
    rounding = 40 * eps * (1 + largest[0] * largest[1])
    assert float(slopes.log_loss) == pytest.approx(float(log_loss), abs=rounding)
    if rounding < 0.1:
        by_W, by_H = np.einsum("kij,kid->jd", P, H), np.einsum("kij,jd->kid", P, W)
        for got, exact in ((by_W, dW), (by_H, dH)):
            assert np.abs(got - exact).max() <= 2 * rounding * np.abs(exact).max()


_slopes = jax.jit(error_slopes)


def test_logits_and_labels_of_any_origin_give_the_same_losses():
    logits = np.array([[0.5, -1.0, 2.0], [3.0, 0.0, -2.0]])
    labels = np.array([2, 0])
    exact = np.log(np.exp(logits).sum(1)) - logits[[0, 1], labels]
    pairs = [
        (logits.tolist(), labels.tolist()),
        (logits.astype(">f4"), labels.astype(">i8")),
        (list(jnp.asarray(logits)), tuple(labels)),
    ]
    for rows, classes in pairs:
        np.testing.assert_allclose(softmax_cross_entropy(rows, classes), exact, rtol=1e-6)
        value = log_softplus(rows)
        np.testing.assert_allclose(value, oracles.log_softplus(logits)[0], rtol=1e-6)


def test_logits_and_labels_that_are_no_arrays_get_advice():
    with pytest.raises(ValueError, match="logits must be an array of numbers, got None"):
        softmax_cross_entropy(None, [0])
    with pytest.raises(ValueError, match="a must be an array of numbers, got None"):
        log_softplus(None)
    with pytest.raises(ValueError, match="labels must be an array of numbers, got None"):
        softmax_cross_entropy(np.zeros((1, 2)), None)


def test_logits_and_labels_of_pytorch_give_the_same_losses():
    torch = pytest.importorskip("torch")
    logits = torch.tensor([[0.5, -1.0], [3.0, 0.0]], requires_grad=True)
    for tensor in (logits, logits.bfloat16()):
        losses = softmax_cross_entropy(tensor, torch.tensor([1, 0]))
        np.testing.assert_allclose(losses, np.log1p(np.exp([1.5, -3.0])), rtol=1e-6)
    np.testing.assert_allclose(log_softplus(logits[1, 1]), np.log(np.log(2)), rtol=1e-6)
