"""Published variants of the metrics at random data: definitions, symmetries, limits."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from formulas import CALLS, UNTRACED, compiled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import RANDOM, WIDE, random_data, seeds

from ncjax import statistics, variants

few = settings(max_examples=settings.default.max_examples * 2 // 5)
# Shapes that other tests compile.
SHAPES = ["K=2, N<d", "d<K-1", *(["wide"] if WIDE else [])]
TRACED = [name for name in CALLS if name not in UNTRACED]

# The exponent p of c^p if all features and b are multiplied by c; 0 for formulas not named
# here. Losses and parts of the squared error are not homogeneous.
DEGREES = {"nc1.cdnv_exp2": -2, "lpm.avg_sq_feature_norm": 2, "nc3.Wmu_plus_b": 1}
DEGREES |= {"margin.logit_min": 1}
DEGREES |= {name: 2 for name in CALLS if name.startswith("nc3.dot_var")}


def drawn(seed, which):
    """Draw other numbers in the shapes of `which`; a campaign draws labels too."""
    known = RANDOM[which]
    (samples, dim), num_classes = known.features.shape, len(known.W)
    data = random_data(seed, num_classes, dim, samples)
    if not WIDE:  # the size of the largest class is a shape too
        labels = np.random.default_rng(seed).permutation(known.labels)
        centres = np.random.default_rng(seed + 1).normal(size=(num_classes, dim))
        data = data._replace(labels=labels, features=data.features + centres[labels])
    spreads = np.linalg.svd(oracles.centred_means(*data[:2]), compute_uv=False)
    # The oracle squares the ratio of the spreads of the class means.
    assume(spreads[0] < 100 * spreads[min(dim, num_classes - 1) - 1])
    return data


def values(data):
    return compiled(data, TRACED) | {name: CALLS[name](data) for name in UNTRACED}


@few
@given(seeds, st.sampled_from(SHAPES), st.sampled_from([0.1, 1.0, 30.0]))
def test_formulas_match_their_definitions(seed, which, scale):
    data = drawn(seed, which)
    data = data._replace(features=scale * data.features, b=scale * data.b)
    for name, value in values(data).items():
        exact = oracles.FORMULAS[name](data)
        np.testing.assert_allclose(value, exact, rtol=1e-8, atol=1e-11, err_msg=name)


@few
@given(seeds, st.sampled_from(SHAPES))
def test_formulas_are_invariant_under_rotation_and_order(seed, which):
    """Rotate the features; permute the samples and the classes."""
    data, rng = drawn(seed, which), np.random.default_rng(seed)
    samples, dim = data.features.shape
    frame = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    order, name_of = rng.permutation(samples), rng.permutation(len(data.W))
    turned = data._replace(
        features=data.features[order] @ frame,
        labels=name_of[data.labels][order],
        W=data.W[np.argsort(name_of)] @ frame,
        b=data.b[np.argsort(name_of)],
        ood_features=data.ood_features @ frame,
    )
    expected = values(data)
    for name, value in values(turned).items():
        np.testing.assert_allclose(value, expected[name], 1e-9, 1e-11, err_msg=name)


@few
@given(seeds, st.sampled_from(SHAPES), st.integers(-200, 200))
def test_formulas_are_homogeneous(seed, which, p):
    data = drawn(seed, which)
    factor = 2.0**p  # rounds nothing
    far = data._replace(
        features=factor * data.features,
        b=factor * data.b,
        ood_features=factor * data.ood_features,
    )
    expected = values(data)
    for name, value in values(far).items():
        if not name.startswith(("loss.", "mse.")):
            same = expected[name] * factor ** DEGREES.get(name, 0)
            np.testing.assert_allclose(value, same, rtol=1e-10, atol=0, err_msg=name)


@few
@given(seeds, st.sampled_from(SHAPES[1:]))
def test_agreement_by_class_matches_loops(seed, which):
    data = drawn(seed, which)
    for bias in (True, False):
        got = variants.ncc_agreement(*data[:3], data.b if bias else None)
        np.testing.assert_allclose(got, oracles.ncc_agreement(data, bias), rtol=1e-15)


@few
@given(seeds, st.sampled_from(SHAPES), st.floats(1e-3, 1e3))
def test_variability_of_features_lies_between_collapse_and_no_classes(seed, which, spread):
    data, num_classes = drawn(seed, which), len(RANDOM[which].W)
    centres = oracles.class_means(*data[:2])[data.labels]
    collapsed = compiled(data._replace(features=centres), TRACED)
    assert abs(float(collapsed["nc1.vci.sample_mean"])) < 1e-12
    assert float(collapsed["nc1.pinv_trace.class_mean"]) < 1e-24
    noise = spread * np.random.default_rng(seed).normal(size=centres.shape)
    loose = compiled(data._replace(features=centres + noise), TRACED)
    assert -1e-12 <= float(loose["nc1.vci.sample_mean"]) <= 1 + 1e-12
    # A class spans at least one direction and at most min(n_k, d).
    ratios = variants.nuclear_over_frobenius(*data[:2], num_classes)
    most = np.minimum(np.bincount(data.labels), data.features.shape[1])
    assert (np.asarray(ratios) >= 1 - 1e-12).all()
    assert (np.asarray(ratios) <= np.sqrt(most) + 1e-12).all()


@few
@given(seeds, st.sampled_from([5e-4, *([1e-6, 1.0] if WIDE else [])]))
def test_parts_of_the_squared_error_sum_to_it(seed, weight_decay):
    """For classes of equal size."""
    data = drawn(seed, "K=2, N<d")
    data = data._replace(labels=np.arange(12) % 2)
    if weight_decay == 5e-4:  # the default
        known = compiled(data, TRACED)
        parts = [float(known[f"mse.{name}"]) for name in ("LNC1", "LNC23", "Lperp")]
    else:
        found = variants.squared_error_parts(*data[:4], weight_decay=weight_decay)
        parts = [float(part) for part in found]
    decay = weight_decay / 2 * (np.sum(data.W**2) + np.sum(data.b**2))
    whole = (oracles.squared_error(data) + decay) / 2
    assert sum(parts) == pytest.approx(whole, rel=1e-9)
    assert min(parts) >= 0
    exact = oracles.squared_error_parts(data, weight_decay)
    np.testing.assert_allclose(parts, exact, rtol=1e-6, atol=1e-12)


@few
@given(seeds, st.sampled_from([0.0, 5e-4]), st.booleans())
def test_parts_of_the_squared_error_with_few_samples(seed, weight_decay, bias):
    """Twelve samples in 20 dimensions: without weight decay they are fitted exactly."""
    data = drawn(seed, "K=2, N<d")
    data = data._replace(labels=np.arange(12) % 2, b=data.b if bias else None)
    parts = variants.squared_error_parts(*data[:4], weight_decay=weight_decay)
    exact = oracles.squared_error_parts(data, weight_decay)
    np.testing.assert_allclose(parts, exact, rtol=1e-6, atol=1e-12)
    if weight_decay == 0:
        error = np.sum((oracles.logits(data, bias) - np.eye(2)[data.labels]) ** 2) / 12
        np.testing.assert_allclose(parts, [0, 0, error / 2], rtol=1e-9, atol=1e-12)


# Directions of rows


@given(
    seed=seeds,
    shape=st.tuples(st.integers(2, 7 if WIDE else 5), st.integers(1, 6)),
    kind=st.sampled_from(["plain", "twins", "antipodes", "near"]),
    exponent=st.integers(-900, 900),
)
def test_one_vs_rest_distances_match_loops(seed, shape, kind, exponent):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=shape)
    if kind == "twins":
        W[1] = 3 * W[0]
    elif kind == "antipodes":
        W[1] = -W[0]
    elif kind == "near":
        W = W[:1] + 1e-3 * W
    lengths = 2.0 ** rng.integers(-30, 30, size=(shape[0], 1)) * 2.0**exponent
    got = variants.one_vs_rest_distances(lengths * W)
    exact = oracles.one_vs_rest_distances(W)
    np.testing.assert_allclose(got, exact, rtol=1e-8, atol=1e-12)
    assert (got <= 2 + 1e-12).all()
    if kind == "twins":
        np.testing.assert_allclose(got[:2], 0, atol=1e-12)


@few
@given(seeds, st.sampled_from([-2.5, -1, 0, 1, 2, 4.5]), st.integers(-400, 400))
def test_uniformity_kernels_match_loops(seed, exponent, p):
    rows = np.random.default_rng(seed).normal(size=(4, 3))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [(j, k) for j in range(4) for k in range(j + 1, 4)]
    distances = np.array([np.linalg.norm(unit[j] - unit[k]) for j, k in pairs])
    expected = {
        ("distance", None): distances,
        ("log", None): -np.log(distances),
        ("riesz", exponent): (1 if exponent >= 0 else -1) * distances ** (-exponent),
        ("riesz", None): 1 / distances,  # d - 2 = 1
    }
    for (kernel, power), values in expected.items():
        got = variants.uniformity_kernel(jnp.asarray(rows * 2.0**p), kernel, power)
        np.testing.assert_allclose(got, values, rtol=1e-9, atol=1e-12)


@few
@given(seeds, st.sampled_from(["class_mean", "sample_mean"]))
def test_centred_means_far_from_the_origin_keep_their_digits(seed, centring):
    """They are exact to the rounding of the features, for any common offset."""
    data, rng = drawn(seed, "d<K-1"), np.random.default_rng(seed)
    coarse = data.features.astype(np.float16).astype(float)
    # Half precision has bits down to 2^-24, so adding the shift rounds nothing.
    shift = rng.integers(-(2**27), 2**27, size=3) * 1.0
    num_classes = len(data.W)
    near, far = (
        statistics.class_statistics(jnp.asarray(x), jnp.asarray(data.labels), num_classes)
        for x in (coarse, coarse + shift)
    )
    expected = oracles.centred_means(coarse, data.labels, centring)
    for seen in (near, far):
        got = statistics.centred_means(seen, centring)
        np.testing.assert_allclose(got, expected, atol=1e-12)
    norm = variants.average_squared_norm(far, centring)
    assert float(norm) == pytest.approx(
        float(variants.average_squared_norm(near, centring)), rel=1e-12
    )
    offset = oracles.global_mean(coarse, data.labels, centring)
    bias = -data.W @ (offset + shift)
    taken_off = variants.mean_logits_norm(
        far, jnp.asarray(data.W), jnp.asarray(bias), centring
    )
    assert float(taken_off) < 1e-5 * np.linalg.norm(bias) + 1e-9
