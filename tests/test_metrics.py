"""Collapse metrics against reference values, definitions, invariances and rounding."""

import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ncjax
from ncjax import statistics
from ncjax.metrics import collapse

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(__file__).parent / "data"
VALUES = json.loads((FOLDER / "collapse_values.json").read_text())

SHAPES = [(2, 3, 20), (3, 1, 25), (6, 3, 40), (4, 30, 12)]  # K, d, N


def clusters(seed, shape, spread=0.5, noise=1.0):
    """Draw unequal classes about centres, and a classifier near these."""
    rng = np.random.default_rng(seed)
    num_classes, dim, samples = shape
    rest = rng.integers(0, num_classes, samples - num_classes) ** 2 % num_classes
    labels = rng.permutation(np.concatenate([np.arange(num_classes), rest]))
    centres = rng.normal(size=(num_classes, dim))
    return oracles.Data(
        features=centres[labels] + spread * rng.normal(size=(samples, dim)),
        labels=labels,
        W=centres + noise * rng.normal(size=centres.shape),
        b=rng.normal(size=num_classes),
    )


def computed(data, **options):
    return ncjax.collapse_metrics_from_features(*data[:4], **options)


def assert_matches_definition(got, data, rtol, atol=0.0, fields=oracles.FIELDS):
    """Compare with the oracle in float64 on the same numbers."""
    exact = oracles.float64(data)
    for field in fields:
        np.testing.assert_allclose(
            getattr(got, field),
            oracles.FORMULAS[oracles.FIELDS[field]](exact),
            rtol=rtol,
            atol=atol,
            err_msg=field,
        )


def assert_same(first, second, rtol=1e-11, atol=1e-13):
    chex.assert_trees_all_close(first, second, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 305, 1000])
def test_fields_match_their_reference_values_in_any_chunks(chunk_size):
    got = computed(oracles.REFERENCE, num_classes=10, chunk_size=chunk_size)
    assert set(got._fields) == set(oracles.FIELDS)
    for field, name in oracles.FIELDS.items():
        np.testing.assert_allclose(
            getattr(got, field), VALUES[f"formula.{name}"], rtol=1e-10, err_msg=field
        )


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    scale=st.integers(-4, 4),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    spread=st.sampled_from([0.01, 0.5, 2.0]),
)
def test_fields_match_their_definitions(seed, shape, scale, offset, spread):
    data = clusters(seed, shape, spread)
    data = data._replace(features=10.0**scale * (data.features + offset))
    assert_matches_definition(computed(data), data, rtol=1e-7, atol=1e-10)


# float32, on numbers that it holds exactly


SHAPE = (6, 16, 200)


@pytest.mark.parametrize("offset", [0, 3000, 1e4])
def test_features_far_from_the_origin_in_float32(offset):
    data = clusters(1, SHAPE)
    features = (data.features + offset).astype(np.float32)
    # The bias cancels the offset, as after training: the logits stay small.
    W = data.W.astype(np.float32)
    b = (data.b - W.astype(float) @ np.full(16, offset)).astype(np.float32)
    data = data._replace(features=features, W=W, b=b)
    got = computed(data)
    assert got.within_class_variation.dtype == np.float32
    smooth = [
        field for field in oracles.FIELDS if field not in ("ncc_mismatch", "accuracy")
    ]
    assert_matches_definition(got, data, rtol=2e-6, fields=smooth)
    # Logits of 1e4 round at 1e-2: a few decisions of 200 may flip.
    assert_matches_definition(got, data, 0, 0.02, fields=("ncc_mismatch", "accuracy"))


def test_nearest_centre_far_from_the_origin_in_float32():
    data = clusters(2, SHAPE, spread=0.1)
    features = (data.features + 3000).astype(np.float32)
    accuracy = ncjax.variants.nearest_centre_accuracy(features, data.labels, 6)
    assert float(accuracy) == 1


def test_variation_of_1e_7_of_the_means_in_float32():
    """Features lie a few roundings around means in [1, 2)."""
    rng = np.random.default_rng(3)
    data = clusters(3, SHAPE)
    means = rng.uniform(1, 1.9, size=(6, 16)).astype(np.float32)
    steps = rng.integers(-2, 3, size=(200, 16)).astype(np.float32)
    features = means[data.labels] + steps * np.float32(2**-23)
    data = data._replace(features=features, W=data.W.astype(np.float32), b=None)
    got = computed(data)
    assert 0 < float(got.within_class_quotient) < 1e-12
    fields = ("within_class_variation", "within_class_quotient", "cdnv")
    assert_matches_definition(got, data, rtol=2e-6, fields=fields)


@pytest.mark.parametrize("offset", [0, 3000])
@pytest.mark.parametrize("isotropic", [True, False])
def test_class_means_with_spreads_that_differ_by_500_in_float32(offset, isotropic):
    """Rounding is amplified by 500 at most; a pseudo-inverse of Σ_B squares that."""
    rng = np.random.default_rng(4)
    data = clusters(4, SHAPE)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    spread = np.concatenate([np.geomspace(100, 0.2, 5), np.full(11, 0.2)])
    means = rng.normal(size=(6, 16)) * spread * (np.arange(16) < 5)
    noise = 0.02 * rng.normal(size=(200, 16)) * (1 if isotropic else spread)
    features = (means[data.labels] + noise) @ rotation + offset
    data = data._replace(
        features=features.astype(np.float32), W=data.W.astype(np.float32), b=None
    )
    fields = ("within_class_variation",)
    assert_matches_definition(computed(data), data, rtol=1e-3, fields=fields)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype):
    data = clusters(5, SHAPE)
    features = jnp.asarray(data.features).astype(dtype)
    W, b = (jnp.asarray(x).astype(dtype) for x in data[2:4])
    got = ncjax.collapse_metrics_from_features(features, data.labels, W, b)
    assert {value.dtype for value in got} == {jnp.dtype(jnp.float32)}
    widened = (np.asarray(x.astype(jnp.float64)) for x in (features, W, b))
    features, W, b = widened
    assert_matches_definition(got, oracles.Data(features, data.labels, W, b), rtol=2e-5)


# The rules of NC4


def test_the_bias_changes_the_agreement_with_the_nearest_centre():
    """Weights m_k with biases -|m_k|²/2 are the nearest-centre rule itself."""
    data = clusters(6, SHAPE, spread=1.5)
    means = oracles.class_means(data.features + 1, data.labels)
    data = data._replace(features=data.features + 1, W=means, b=-np.sum(means**2, 1) / 2)
    assert float(computed(data).ncc_mismatch) == 0
    assert float(computed(data._replace(b=None)).ncc_mismatch) > 0.1


# Streaming


def test_streaming_in_batches_with_a_padded_last_batch_agrees_with_one_call():
    data = clusters(7, SHAPE)
    size, batch = 200, 64
    padded = -size % batch
    features = np.pad(data.features, ((0, padded), (0, 0)), constant_values=np.nan)
    labels = np.pad(data.labels, (0, padded), constant_values=-1)
    rows = [slice(i, i + batch) for i in range(0, size + padded, batch)]
    update, compare = jax.jit(statistics.update), jax.jit(statistics.compare)
    first_pass = statistics.init(6, 16, jnp.float64)
    for row in rows:
        mask = np.arange(row.start, row.stop) < size
        first_pass = update(first_pass, features[row], labels[row], mask)
    against = statistics.reference(first_pass)
    second_pass = statistics.init_comparison(6, jnp.float64)
    for row in rows:
        mask = np.arange(row.start, row.stop) < size
        second_pass = compare(
            second_pass, first_pass, against, features[row], labels[row], *data[2:4], mask
        )
    got = collapse.metrics_from_statistics(first_pass, second_pass, data.W)
    assert_same(got, computed(data))


# The layer-peeled model


def random_params(seed=8):
    rng = np.random.default_rng(seed)
    return ncjax.Params(
        jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.normal(size=(4, 5, 6)))
    )


def test_layer_peeled_model_and_network_share_one_formula():
    params = random_params()
    features, labels = np.asarray(params.H).reshape(-1, 6), np.repeat(np.arange(4), 5)
    from_features = ncjax.collapse_metrics_from_features(features, labels, params.W)
    assert_same(ncjax.collapse_metrics(params), from_features)


def test_exact_collapse_gives_zeros():
    etf = ncjax.simplex_etf(5, 7, jax.random.key(1))
    params = ncjax.Params(2 * etf, jnp.repeat(3 * etf[:, None], 4, axis=1))
    got = ncjax.collapse_metrics(params)._asdict()
    assert float(got.pop("accuracy")) == 1
    assert float(got.pop("ncc_mismatch")) == 0
    for field, value in got.items():
        assert abs(float(value)) < 1e-14, field


def test_invariance_under_scale_rotation_and_translation():
    data = clusters(9, SHAPE)
    expected = computed(data)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(16, 16)))[0]
    shift = np.arange(16.0)
    moved = {
        "rotation": data._replace(features=data.features @ rotation, W=data.W @ rotation),
        "translation": data._replace(
            features=data.features + shift, b=data.b - data.W @ shift
        ),
        "scale": data._replace(features=1e3 * data.features, b=1e3 * data.b),
        "classifier scale": data._replace(W=1e-3 * data.W, b=1e-3 * data.b),
    }
    for same in moved.values():
        assert_same(computed(same), expected, rtol=1e-10)


def test_metrics_under_jit_and_vmap():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(random_params, (1, 2)))
    got = jax.jit(jax.vmap(ncjax.collapse_metrics))(stacked)
    for seed, index in ((1, 0), (2, 1)):
        each = jax.tree.map(lambda leaf, index=index: leaf[index], got)
        assert_same(each, ncjax.collapse_metrics(random_params(seed)))
    data = [clusters(seed, SHAPE) for seed in (1, 2)]
    batched = (np.stack(arrays) for arrays in zip(*(one[:4] for one in data), strict=True))
    got = jax.vmap(partial(ncjax.collapse_metrics_from_features, chunk_size=64))(*batched)
    for index, one in enumerate(data):
        each = jax.tree.map(lambda leaf, index=index: leaf[index], got)
        assert_same(each, computed(one))


# Memory


def shapes(jaxpr):
    """Yield the shapes of all arrays in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_no_array_is_of_size_d_by_d():
    num_classes, dim, samples = 10, 4096, 64
    arguments = (
        jax.ShapeDtypeStruct((samples, dim), jnp.float32),
        jax.ShapeDtypeStruct((samples,), jnp.int32),
        jax.ShapeDtypeStruct((num_classes, dim), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(ncjax.collapse_metrics_from_features)(*arguments).jaxpr
    seen = list(shapes(jaxpr))
    assert (num_classes, dim) in seen
    assert (num_classes, num_classes) in seen
    # The largest is (K, K, d), of differences of class means.
    assert max(np.prod(shape, dtype=int) for shape in seen) == num_classes**2 * dim


def test_memory_beyond_the_features_is_one_chunk():
    function = jax.jit(partial(ncjax.collapse_metrics_from_features, chunk_size=2000))
    compiled = function.lower(
        jax.ShapeDtypeStruct((10**6, 64), jnp.float32),
        jax.ShapeDtypeStruct((10**6,), jnp.int32),
        jax.ShapeDtypeStruct((10, 64), jnp.float32),
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2000 * 64 * 4


# Errors


GOOD = clusters(10, (3, 4, 12))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": GOOD.features[0]}, r"expected features \(N, d\) and W"),
        ({"features": GOOD.features[:, :3]}, r"got \(12, 3\) and \(3, 4\)"),
        ({"W": GOOD.W.T}, r"got \(12, 4\) and \(4, 3\): transpose W"),
        ({"W": GOOD.W[0]}, r"expected features \(N, d\) and W \(K, d\)"),
        ({"labels": GOOD.labels[:5]}, r"expected labels of integers \(12,\)"),
        ({"labels": GOOD.labels.astype(float)}, r"got float64 \(12,\): cast them"),
        ({"labels": np.eye(3)[GOOD.labels]}, r"got float64 \(12, 3\): take labels.argmax"),
        ({"labels": GOOD.labels[:, None]}, r"got int\d* \(12, 1\): take labels\[:, 0\]"),
        (
            {"labels": np.array(list("abc"))[GOOD.labels]},
            r"got <U1 \(12,\): number the classes by",
        ),
        ({"labels": GOOD.labels + 1}, "got 1 to 3: number the classes from 0"),
        ({"labels": GOOD.labels - 1}, r"labels must lie in \[0, 3\), got -1 to 1"),
        ({"labels": GOOD.labels + 0.5}, r"got float64 \(12,\): they are not whole numbers"),
        ({"labels": GOOD.labels > 0}, r"got bool \(12,\): cast them"),
        ({"labels": GOOD.labels.astype(object)}, r"got object \(12,\): number the classes"),
        ({"labels": None}, "labels must be an array of numbers, got None"),
        ({"labels": GOOD.labels % 2}, r"none has label \[2\]: add samples, or leave"),
        ({"b": np.zeros(4)}, r"expected b \(3,\), got \(4,\)"),
        ({"b": np.zeros(3, int)}, "b must be floating"),
        ({"b": np.full(3, np.inf)}, "b must be finite"),
        ({"W": np.full((3, 4), np.nan)}, "W must be finite, got 12 of 12"),
        ({"W": np.ones((3, 4), int)}, "W must be floating"),
        ({"W": GOOD.W[:1]}, "num_classes must be an integer of at least 2"),
        ({"features": np.ones((12, 4), int)}, "features must be floating"),
        ({"features": GOOD.features * np.nan}, "features must be finite, got 48 of 48"),
        (
            {"features": np.ones((12, 4), bool)},
            "features must be floating, got bool: cast it",
        ),
        ({"features": GOOD.features * 1j}, "features must be floating, got complex128$"),
        ({"features": GOOD.features[None]}, r"got \(1, 12, 4\) and \(3, 4\): reshape them"),
        (
            {"features": [GOOD.features[:8], GOOD.features[8:]]},
            r"features must be .* got a list of 2 entries .*, \(8, 4\) and \(4, 4\): join",
        ),
        ({"W": None}, "W must be an array of numbers, got None"),
        ({"features": np.ones((12, 0)), "W": np.ones((3, 0))}, "dim must be an integer"),
        (
            {"features": np.ones((0, 4)), "labels": np.zeros(0, int)},
            r"every class needs a sample, none has label \[0, 1, 2\]",
        ),
    ],
)
def test_bad_features_labels_and_classifiers_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        computed(GOOD._replace(**changed))


INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8")


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_every_integer_type_give_the_same(dtype, x64):
    with jax.enable_x64(x64):
        got = computed(GOOD._replace(labels=GOOD.labels.astype(dtype)))
        chex.assert_trees_all_equal(got, computed(GOOD))


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize(
    ("dtype", "one", "shift", "least", "largest"),
    [
        ("i8", 2**32, 0, 0, 2**32),
        ("i8", 2**32 + 1, 0, 0, 2**32 + 1),
        (">i8", 2**32 + 1, 0, 0, 2**32 + 1),
        ("u8", 2**63 + 1, 0, 0, 2**63 + 1),
        ("i8", 1 - 2**32, 0, 1 - 2**32, 2),
        ("i8", 0, 2**32, 2**32, 2**32 + 2),
        (list, 2**32 + 1, 0, 0, 2**32 + 1),
    ],
)
def test_labels_out_of_range_are_reported_as_given(dtype, one, shift, least, largest, x64):
    """Without x64, JAX turns 2^32 + k into k before anyone can see it."""
    given = [int(label) + shift for label in GOOD.labels]
    given[0] = one + shift
    labels = given if dtype is list else np.array(given, dtype)
    message = rf"labels must lie in \[0, 3\), got {least} to {largest}$"
    with jax.enable_x64(x64):
        for function in (
            lambda: computed(GOOD._replace(labels=labels)),
            lambda: ncjax.variants.within_class_variation(GOOD.features, labels, 3),
            lambda: ncjax.last_layer(GOOD.features, labels, GOOD.W),
            lambda: ncjax.peel(GOOD.features, labels, GOOD.W),
        ):
            with pytest.raises(ValueError, match=message):
                function()


@pytest.mark.parametrize("kind", ["f2", ">f4", ">f8", "list", "float16", "bfloat16"])
def test_features_of_other_kinds_match_their_definitions(kind):
    """Names in full are types of PyTorch."""
    features = GOOD.features
    if kind in ("float16", "bfloat16"):
        torch = pytest.importorskip("torch")
        given = torch.tensor(features, requires_grad=True).to(getattr(torch, kind))
        features = given.detach().double().numpy()
    elif kind == "list":
        given = features.tolist()
    else:
        given = features.astype(kind)
        features = given.astype(float)
    got = computed(GOOD._replace(features=given))
    assert_matches_definition(got, GOOD._replace(features=features), rtol=2e-5)


def test_features_overwritten_after_the_call_do_not_change_the_result():
    features, labels = np.tile(GOOD.features, (20000, 1)), np.tile(GOOD.labels, 20000)
    expected = jax.device_get(computed(GOOD._replace(features=features, labels=labels)))
    got = computed(GOOD._replace(features=features, labels=labels))
    features[:], labels[:] = np.nan, -1
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 4}, "num_classes is 4 but W has 3 rows"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"chunk_size": 2.0}, "chunk_size must be an integer of at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        computed(GOOD, **options)


def test_bad_params_are_refused():
    W, H = random_params()
    for params, message in (
        (W, r"expected ncjax.Params\(W, H\)"),
        (ncjax.Params(W, H[:, 0]), r"expected W \(K, d\) and H \(K, n, d\)"),
        (ncjax.Params(W, H.astype(jnp.float32)), "one floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            ncjax.collapse_metrics(params)
