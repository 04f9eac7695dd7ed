"""Every formula of the convolution and of max pooling, against loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncjax.networks import convolution, winograd
from ncjax.networks.convolution import (
    convolve,
    convolve_canonical,
    convolve_dense,
    convolve_gathered,
    convolve_lax,
    convolve_pointwise,
    convolve_winograd,
    max_pool,
)
from ncjax.networks.grouping import map_groups, sum_groups

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

FORMULAS = {
    "lax": convolve_lax,
    "canonical": convolve_canonical,
    "gathered": convolve_gathered,
    "dense": convolve_dense,
}
# Shape of x, shape of the kernel, stride, padding, and the formula chosen on CPU.
LAYERS = {
    "cifar stem": ((2, 6, 5, 3), (3, 3, 3, 4), 1, 1, convolve_canonical),
    "imagenet stem": ((2, 9, 12, 3), (7, 7, 3, 4), 2, 3, convolve_canonical),
    "3x3": ((2, 5, 4, 5), (3, 3, 5, 3), 1, 1, convolve_canonical),
    "3x3 of 2x2": ((3, 2, 2, 5), (3, 3, 5, 4), 1, 1, convolve_dense),
    "3x3 of 1x1": ((3, 1, 1, 5), (3, 3, 5, 4), 1, 1, convolve_dense),
    "3x3 of 1x3": ((2, 1, 3, 5), (3, 3, 5, 4), 1, 1, convolve_dense),
    "3x3, many channels and tiles": (
        (6, 13, 9, 16),
        (3, 3, 16, 17),
        1,
        1,
        convolve_winograd,
    ),
    "3x3, few tiles": ((5, 13, 9, 16), (3, 3, 16, 17), 1, 1, convolve_canonical),
    "3x3, few channels": ((6, 13, 9, 15), (3, 3, 15, 17), 1, 1, convolve_canonical),
    "strided": ((2, 8, 8, 16), (3, 3, 16, 17), 2, 1, convolve_gathered),
    "strided, odd": ((2, 7, 5, 6), (3, 3, 6, 2), 2, 1, convolve_canonical),
    "strided to 1x1": ((2, 2, 2, 5), (3, 3, 5, 4), 2, 1, convolve_dense),
    "strided, large": ((1, 9, 10, 5), (3, 3, 5, 2), 2, 1, convolve_canonical),
    "1x1": ((2, 4, 3, 5), (1, 1, 5, 4), 1, 0, convolve_pointwise),
    "1x1 strided": ((2, 5, 4, 5), (1, 1, 5, 4), 2, 0, convolve_pointwise),
    "1x1 of one channel": ((2, 2, 2, 1), (1, 1, 1, 1), 1, 0, convolve_pointwise),
    "no padding": ((2, 5, 6, 2), (3, 3, 2, 3), 1, 0, convolve_canonical),
    "more padding than kernel": ((2, 2, 3, 5), (1, 1, 5, 2), 2, 3, convolve_lax),
    "5x2": ((2, 6, 4, 5), (5, 2, 5, 3), 1, 1, convolve_canonical),
    "strided, not square": ((1, 7, 4, 5), (5, 2, 5, 4), 2, 1, convolve_gathered),
}
# Shape of x, size, stride, padding.
POOLS = {
    "vgg": ((2, 6, 4, 3), 2, 2, 0),
    "vgg, odd": ((2, 5, 7, 3), 2, 2, 0),
    "imagenet stem": ((2, 8, 6, 3), 3, 2, 1),
    "imagenet stem, odd": ((2, 7, 5, 3), 3, 2, 1),
    "of one pixel": ((2, 1, 1, 3), 3, 2, 1),
    "overlapping": ((2, 5, 4, 2), 3, 1, 0),
    "apart": ((1, 8, 9, 2), 2, 3, 1),
}


def convolution_by_loops(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = range(0, x.shape[1] - kernel.shape[0] + 1, stride)
    columns = range(0, x.shape[2] - kernel.shape[1] + 1, stride)
    y = np.zeros((x.shape[0], len(rows), len(columns), kernel.shape[3]))
    for p, row in enumerate(rows):
        for q, column in enumerate(columns):
            for i in range(kernel.shape[0]):
                for j in range(kernel.shape[1]):
                    y[:, p, q] += x[:, row + i, column + j] @ kernel[i, j]
    return y


def max_pool_by_loops(x, size, stride, padding):
    border = (padding, padding)
    x = np.pad(x, ((0, 0), border, border, (0, 0)), constant_values=-np.inf)
    rows = range(0, x.shape[1] - size + 1, stride)
    columns = range(0, x.shape[2] - size + 1, stride)
    return np.stack(
        [
            np.stack(
                [x[:, i : i + size, j : j + size].max((1, 2)) for j in columns], axis=1
            )
            for i in rows
        ],
        axis=1,
    )


def reduce_window(x, size, stride, padding):
    border = (padding, padding)
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), border, border, (0, 0)),
    )


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def distinct(shape, seed=0):
    """An array without two equal entries, half of them negative."""
    size = np.prod(shape)
    return np.random.default_rng(seed).permutation(size).reshape(shape) - size / 2


def with_gradients(function, cotangent, *arguments):
    """The value and the gradients of all arguments."""
    value, pull = jax.vjp(function, *arguments)
    return value, *pull(cotangent)


def assert_convolutions_equal(x_shape, kernel_shape, stride, padding, seed=0, **more):
    """Compare all formulas, and those in `more`, with loops and with each other.

    XLA's own formula is left out if the kernel is strided and not square: XLA 0.10 aborts
    over the gradients of some of these, such as 5x2 over 7x4.
    """
    formulas = {**FORMULAS, **more}
    if stride > 1 and kernel_shape[0] != kernel_shape[1]:
        del formulas["lax"], formulas["canonical"]
    x, kernel = normal(x_shape, kernel_shape, seed=seed)
    expected = convolution_by_loops(x, kernel, stride, padding)
    (cotangent,) = normal(expected.shape, seed=seed + 1)

    @jax.jit
    def all_of_them(*arrays):
        return {
            name: with_gradients(partial(formula, stride=stride, padding=padding), *arrays)
            for name, formula in formulas.items()
        }

    results = all_of_them(cotangent, x, kernel)
    reference = results["lax" if "lax" in results else "dense"]
    for name, (value, *gradients) in results.items():
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12, err_msg=name)
        for got, exact in zip(gradients, reference[1:], strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_formulas_match_loops_and_gradients_match_lax(layer):
    assert_convolutions_equal(*layer[:4], picked=convolve)


@st.composite
def layers(draw):
    """Draw shapes of a map that is at least as large as its kernel once padded."""
    window = draw(st.sampled_from([(1, 1), (3, 3), (7, 7), (5, 2)]))
    padding = draw(st.integers(0, 3))
    least = [max(1, size - 2 * padding) for size in window]
    height, width = (draw(st.integers(size, size + 4)) for size in least)
    batch, inputs, outputs = (draw(st.integers(1, most)) for most in (3, 6, 4))
    stride = draw(st.integers(1, 2))
    return (batch, height, width, inputs), (*window, inputs, outputs), stride, padding


@given(layers(), st.integers(0, 2**31))
@settings(max_examples=settings.default.max_examples * 2 // 5)
def test_formulas_match_loops_for_any_shape(layer, seed):
    _, kernel_shape, stride, padding = layer
    fits = (*kernel_shape[:2], stride, padding) == (3, 3, 1, 1)
    more = {"winograd": convolve_winograd} if fits else {}
    assert_convolutions_equal(*layer, seed=seed, **more)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_chosen_formula_is_the_expected_one(layer, platform, monkeypatch):
    x_shape, kernel_shape, stride, padding, on_cpu = layer
    called = []
    formulas = {n: f for n, f in vars(convolution).items() if n.startswith("convolve_")}
    for name, formula in formulas.items():

        def noted(*args, name=name, formula=formula, **settings):
            called.append(name)
            return formula(*args, **settings)

        monkeypatch.setattr(convolution, name, noted)
    convolve(jnp.zeros(x_shape), jnp.zeros(kernel_shape), stride, padding)
    assert called[0] == (on_cpu.__name__ if platform == "cpu" else "convolve_lax")


WINOGRAD = [
    ("3x3, many channels and tiles", 72),
    ("3x3, many channels and tiles", 24),  # groups of two images
    ("3x3 of 2x2", 1),
    ("3x3 of 1x3", 2),
    ("3x3", 4),
    ("cifar stem", 8),
]


@pytest.mark.parametrize(("name", "tiles"), WINOGRAD)
def test_winograd_matches_loops_and_gradients_match_lax(name, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "_tiles_at_once", lambda *_: tiles)
    assert_convolutions_equal(*LAYERS[name][:4], winograd=convolve_winograd)


def test_winograd_rounds_a_few_times_more_than_lax_in_float32():
    arrays = normal((8, 16, 16, 64), (8, 16, 16, 64), (3, 3, 64, 64))
    single = [array.astype(np.float32) for array in arrays]
    lax = partial(convolve_lax, stride=1, padding=1)

    @jax.jit
    def all_of_them(single, double):
        return [
            with_gradients(lax, *double),
            with_gradients(lax, *single),
            with_gradients(convolve_winograd, *single),
        ]

    double = [array.astype(float) for array in single]
    for exact, plain, fast in zip(*all_of_them(single, double), strict=True):
        assert fast.dtype == np.float32
        errors = [np.std(np.asarray(got, float) - exact) for got in (plain, fast)]
        assert errors[1] < 4 * errors[0]
        assert errors[1] < 4e-6 * np.std(exact)


@pytest.mark.parametrize(
    ("dtype", "formula"),
    [(jnp.float32, "convolve_winograd"), (jnp.bfloat16, "convolve_canonical")],
)
def test_winograd_is_not_used_in_half_precision(dtype, formula):
    shapes = LAYERS["3x3, many channels and tiles"][:2]
    assert convolution._formula(*shapes, 1, 1, dtype).__name__ == formula


@pytest.mark.parametrize("each", [1, 3, 4])
def test_gathering_in_several_parts_agrees_with_one_part(each, monkeypatch):
    monkeypatch.setattr(convolution, "_images_at_once", lambda *_: each)
    assert_convolutions_equal((7, 5, 4, 3), (3, 3, 3, 2), 2, 1)


@pytest.mark.parametrize(
    "name", ["3x3 of 1x1", "strided, large", "strided", "3x3, many channels and tiles"]
)
def test_second_derivatives_match_lax(name):
    """Hessian times a direction, by both orders of differentiation."""
    x_shape, kernel_shape, stride, padding, _ = LAYERS[name]
    point, direction = (
        tuple(normal(x_shape, kernel_shape, seed=seed)) for seed in range(2)
    )

    @jax.jit
    def products(point, direction):
        def forward_of_reverse(formula):
            gradient = jax.grad(lambda z: jnp.sum(jnp.sin(formula(*z, stride, padding))))
            return jax.jvp(gradient, (point,), (direction,))[1]

        def reverse_of_reverse(formula):
            gradient = jax.grad(lambda z: jnp.sum(jnp.sin(formula(*z, stride, padding))))
            return jax.vjp(gradient, point)[1](direction)[0]

        return (
            forward_of_reverse(convolve_lax),
            [forward_of_reverse(convolve), reverse_of_reverse(convolve)],
        )

    exact, others = products(point, direction)
    for other in others:
        for got, wanted in zip(other, exact, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["3x3", "3x3 of 2x2", "strided"])
def test_convolution_is_batched(name):
    """Over several kernels, over several batches, and over both."""
    x_shape, kernel_shape, stride, padding, _ = LAYERS[name]
    x, kernel = normal((2, *x_shape), (2, *kernel_shape))
    loops = partial(convolution_by_loops, stride=stride, padding=padding)
    cases = [
        ((0, 0), (x, kernel), [loops(x[i], kernel[i]) for i in range(2)]),
        ((0, None), (x, kernel[0]), [loops(x[i], kernel[0]) for i in range(2)]),
        ((None, 0), (x[0], kernel), [loops(x[0], kernel[i]) for i in range(2)]),
    ]

    @jax.jit
    def all_of_them(*pairs):
        return [
            [
                jax.vmap(partial(formula, stride=stride, padding=padding), axes)(*pair)
                for formula in FORMULAS.values()
            ]
            for (axes, _, _), pair in zip(cases, pairs, strict=True)
        ]

    results = all_of_them(*(pair for _, pair, _ in cases))
    for (_, _, expected), values in zip(cases, results, strict=True):
        for value in values:
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["3x3 of 1x1", "strided"])
def test_convolution_keeps_the_dtype(name, dtype):
    x_shape, kernel_shape, stride, padding, _ = LAYERS[name]
    x, kernel = (jnp.asarray(array, dtype) for array in normal(x_shape, kernel_shape))
    expected = convolution_by_loops(
        np.asarray(x, float), np.asarray(kernel, float), stride, padding
    )
    cotangent = jnp.asarray(normal(expected.shape, seed=1)[0], dtype)

    @jax.jit
    def all_of_them(*arrays):
        in_double = [array.astype(float) for array in arrays]
        lax = partial(convolve_lax, stride=stride, padding=padding)
        return with_gradients(lax, *in_double), [
            with_gradients(partial(formula, stride=stride, padding=padding), *arrays)
            for formula in FORMULAS.values()
        ]

    tol = 4 * float(jnp.finfo(dtype).eps)
    exact, rounded = all_of_them(cotangent, x, kernel)
    np.testing.assert_allclose(exact[0], expected, rtol=1e-12, atol=1e-12)
    for results in rounded:
        for got, wanted in zip(results, exact, strict=True):
            assert got.dtype == dtype
            scale = float(jnp.max(jnp.abs(wanted)))
            np.testing.assert_allclose(
                np.asarray(got, float), wanted, rtol=tol, atol=tol * scale
            )


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape"),
    [
        ((8, 8, 3), (3, 3, 3, 4)),
        ((2, 8, 8, 3), (3, 3, 3)),
        ((2, 8, 8, 3), (3, 3, 4, 3)),
        ((2, 3, 8, 8), (3, 3, 3, 4)),
    ],
)
def test_mismatched_shapes_are_named(x_shape, kernel_shape):
    with pytest.raises(ValueError, match=r"expected x \(B, height, .* got \(") as error:
        convolve(jnp.zeros(x_shape), jnp.zeros(kernel_shape))
    assert str(error.value).endswith(f"got {x_shape} and {kernel_shape}")


@pytest.mark.usefixtures("platform")
def test_images_smaller_than_the_window_are_named():
    x = jnp.zeros((2, 4, 2, 3))
    message = "image of 4x2 with padding 0 is smaller than the window of 3x3"
    with pytest.raises(ValueError, match=message):
        convolve(x, jnp.zeros((3, 3, 3, 1)))
    with pytest.raises(ValueError, match=message):
        max_pool(x, 3, 2)
    with pytest.raises(ValueError, match=r"4x2 with padding 1 .* window of 7x7"):
        convolve(x, jnp.zeros((7, 7, 3, 1)), padding=1)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.usefixtures("platform")
def test_max_pool_matches_loops_and_reduce_window(pool):
    shape, *options = pool
    x = distinct(shape)
    expected = max_pool_by_loops(x, *options)
    (cotangent,) = normal(expected.shape)

    @jax.jit
    def both(*arrays):
        return [
            with_gradients(lambda x, pool=pool: pool(x, *options), *arrays)
            for pool in (max_pool, reduce_window)
        ]

    (value, gradient), (_, exact) = both(cotangent, x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(gradient, exact, rtol=1e-14)


@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 7, 7, 2))),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_max_pool_matches_loops_for_any_shape(shape, size, stride, padding, seed):
    x = jnp.asarray(distinct(shape, seed))
    if padding > size // 2:
        with pytest.raises(ValueError, match="at most half the window"):
            max_pool(x, size, stride, padding)
        return
    if min(shape[1:3]) + 2 * padding < size:
        with pytest.raises(ValueError, match="smaller than the window"):
            max_pool(x, size, stride, padding)
        return
    got = jax.jit(lambda x: max_pool(x, size, stride, padding))(x)
    np.testing.assert_array_equal(got, max_pool_by_loops(x, size, stride, padding))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("platform")
def test_max_pool_keeps_the_dtype_and_is_batched(dtype):
    x = jnp.asarray(normal((2, 2, 5, 4, 3))[0], dtype)
    got = jax.vmap(lambda x: max_pool(x, 3, 2, 1))(x)
    assert got.dtype == dtype
    for one, whole in zip(got, np.asarray(x, float), strict=True):
        np.testing.assert_array_equal(
            np.asarray(one, float), max_pool_by_loops(whole, 3, 2, 1)
        )


def test_gradients_of_equal_maxima_add_up(platform):
    """On CPU equal maxima share the gradient; elsewhere the first one has it."""
    x = jnp.asarray([[3.0, 1.0, 3.0], [0.0, 3.0, 2.0]])[None, :, :, None]
    (gradient,) = jax.vjp(lambda x: max_pool(x[:, :, :2], 2, 2), x)[1](
        jnp.full((1, 1, 1, 1), 8.0)
    )
    share = 4.0 if platform == "cpu" else 0.0
    expected = [[8.0 - share, 0.0, 0.0], [0.0, share, 0.0]]
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


@given(st.integers(0, 6), st.integers(0, 7), st.integers(0, 2**31))
def test_processing_images_in_parts_agrees_with_all_at_once(count, each, seed):
    x, y = np.random.default_rng(seed).normal(size=(2, count, 3))
    np.testing.assert_array_equal(map_groups(lambda x: 2 * x, each, x), 2 * x)
    total = sum_groups(lambda x, y: jnp.matmul(x.T, y), each, x, y)
    np.testing.assert_allclose(total, x.T @ y, atol=1e-14)


@pytest.mark.parametrize("empty", ["images", "channels"])
@pytest.mark.parametrize("name", ["3x3 of 2x2", "strided", "1x1", "3x3"])
def test_no_images_give_no_images_and_no_gradient(name, empty):
    (batch, *size, channels), kernel_shape, stride, padding, _ = LAYERS[name]
    x = jnp.zeros((0, *size, channels) if empty == "images" else (batch, *size, 0))
    kernel = jnp.ones((*kernel_shape[:2], x.shape[3], kernel_shape[3]))
    value, pull = jax.vjp(partial(convolve, stride=stride, padding=padding), x, kernel)
    np.testing.assert_array_equal(value, 0)
    assert value.shape[0] == x.shape[0]
    by_x, by_kernel = pull(value)
    assert by_x.shape == x.shape
    np.testing.assert_array_equal(by_kernel, 0 * kernel)


@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (3, 3, 3, 2)])
def test_two_dtypes_and_empty_kernels_are_refused(shape):
    x = jnp.zeros((1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"of one dtype .* got float64 and float32"):
        convolve(x, jnp.zeros(shape, jnp.float32))
    with pytest.raises(ValueError, match=r"h and w at least 1, got float64 and float64"):
        convolve(x, jnp.zeros((0, *shape[1:])))
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        max_pool(x, 0, 1)
