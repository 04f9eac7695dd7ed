"""The formulas of docs/scaling.md, against the counts of XLA and its compiled programs."""

import itertools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subprocesses

import ncjax
from ncjax import statistics
from ncjax.flow import block_solve, clock
from ncjax.metrics import collapse
from ncjax.networks import convolution, models
from ncjax.peeled import kernels

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
single = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
double = partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
integer = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def params(K, n, d):
    return ncjax.Params(double((K, d)), double((K, n, d)))


def clock_field(K, n, d):
    return clock.field, double(()), params(K, n, d)


def time_derivative(K, n, d):
    derivative = clock.LINEARLY_IMPLICIT.time_derivative
    return derivative, double(()), params(K, n, d), clock.CROSS_ENTROPY


def factor(K, n, d):
    def with_slopes(params, c):
        return block_solve.factor(params, kernels.error_slopes(params), c)

    return with_slopes, params(K, n, d), double(())


def solve(K, n, d):
    factored = jax.eval_shape(*factor(K, n, d))
    return block_solve.solve, factored, params(K, n, d)


def block_sweep(K, d):
    """XLA counts the body of a loop once: one of K eliminations of d unknowns."""
    return partial(block_solve.inverse, block=d), double((K * d, K * d))


def sweep(N, K):
    """One of K eliminations of one unknown, in N matrices."""
    return block_solve.inverse, double((N, K, K))


def first_pass(K, d):
    return jax.eval_shape(partial(statistics.init, K, d))


def second_pass(K):
    return jax.eval_shape(partial(statistics.init_comparison, K))


def update(B, K, d):
    batch = B + 2  # as many samples as classes on the whole grid
    return statistics.update, first_pass(K, d), single((batch, d)), integer((batch,))


def compare(B, K, d):
    against = jax.eval_shape(statistics.reference, first_pass(K, d))
    batch = single((B, d)), integer((B,)), single((K, d))
    return statistics.compare, second_pass(K), first_pass(K, d), against, *batch


def last(K, d):
    made = first_pass(K, d), second_pass(K), single((K, d))
    return collapse.metrics_from_statistics, *made


def lowered(case):
    """Operations that XLA counts in a program as it is written."""
    fn, *arguments = case
    return jax.jit(fn).lower(*arguments).cost_analysis()["flops"]


def compiled(case):
    fn, *arguments = case
    return jax.jit(fn).lower(*arguments).compile()


def polynomial(case, degrees):
    """Coefficients of the operations by exponents, interpolated on a grid of sizes."""
    grid = [np.arange(3, 4 + degree) for degree in degrees]
    counts = [lowered(case(*map(int, sizes))) for sizes in itertools.product(*grid)]
    found = np.reshape(counts, [degree + 1 for degree in degrees])
    for axis, points in enumerate(grid):
        inverse = np.linalg.inv(np.vander(points.astype(float), increasing=True))
        found = np.moveaxis(np.tensordot(inverse, found, (1, axis)), 0, axis)
    return found


# Exponents (of K, n, d or as the case names them) and their coefficients.
PRODUCTS = {
    clock_field: ((2, 1, 1), {(2, 1, 1): 6}),
    time_derivative: ((2, 1, 1), {(2, 1, 1): 8}),
    # 6 N K² d² + 2 N K d² + 2 N K² d + 2 K³ d, N = K n; one of three N K d is elementwise
    factor: (
        (3, 1, 3),
        {(3, 1, 2): 6, (2, 1, 2): 2, (3, 1, 1): 2, (3, 0, 1): 2, (2, 1, 1): 3},
    ),
    solve: ((3, 1, 2), {(2, 1, 1): 14, (3, 1, 0): 6, (2, 0, 2): 2, (2, 0, 1): 2}),
    # K times: 2 K³ d³ + 4 K² d³; the inverse of the pivot has a loop of its own
    block_sweep: ((2, 3), {(2, 3): 2, (1, 3): 4}),
    sweep: ((1, 2), {(1, 2): 2}),
    update: ((1, 1, 1), {(1, 1, 1): 0, (1, 0, 1): 6}),  # on CPU: additions
    compare: ((1, 1, 1), {(1, 1, 1): 6}),
    last: ((2, 1), {(2, 1): 13}),
}


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.__name__)
def test_the_leading_coefficients_equal_the_counts_of_xla(case):
    degrees, expected = PRODUCTS[case]
    found = polynomial(case, degrees)
    for exponents, coefficient in expected.items():
        assert found[exponents] == pytest.approx(coefficient, abs=1e-3), exponents
    # The count is a polynomial without terms that the interpolation would miss.
    sizes = [degree + 9 for degree in degrees]
    value = found
    for size, degree in zip(sizes, degrees, strict=True):
        powers = float(size) ** np.arange(degree + 1)
        value = np.tensordot(powers, value, (0, 0))
    assert lowered(case(*sizes)) == pytest.approx(float(value), rel=1e-6)


# The compiler adds elementwise or repeated work, whose share falls with size.
@pytest.mark.parametrize(
    ("case", "products", "most"),
    [
        (clock_field(10, 20, 64), 6 * 200 * 10 * 64, 1.25),
        (clock_field(20, 20, 128), 6 * 400 * 20 * 128, 1.1),
        (solve(8, 4, 16), 14 * 32 * 128 + 6 * 32 * 64 + 2 * 128**2 + 2 * 64 * 16, 1.05),
        # three products, and the squares of the differences from class means
        (compare(1000, 10, 512), 2 * 1000 * (29 + 1) * 512, 1.1),
    ],
    ids=["field", "larger field", "solve", "compare"],
)
def test_compiled_programs_compute_little_besides_products(case, products, most):
    assert 1 <= compiled(case).cost_analysis()["flops"] / products <= most


@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
@pytest.mark.usefixtures("platform")
def test_class_sums_are_a_matrix_product_on_accelerators():

    def elsewhere(B, K, d):
        fn, *arguments = update(B, K, d)
        return lambda *given: fn(*given), *arguments  # traced anew

    assert polynomial(elsewhere, (1, 1, 1))[1, 1, 1] == pytest.approx(2, abs=1e-3)
    products = 2 * 1000 * 40 * 512
    counted = compiled(elsewhere(1000, 40, 512)).cost_analysis()["flops"]
    assert 1 <= counted / products <= 1.15


def temporary_numbers(case, itemsize):
    return compiled(case).memory_analysis().temp_size_in_bytes / itemsize


@pytest.mark.parametrize(("K", "n", "d"), [(10, 50, 20), (20, 5, 20)])
def test_memory_of_an_implicit_step_is_as_documented(K, n, d):
    samples = K * n
    most = 3 * (K * d) ** 2 + 2 * samples * d**2 + samples * K * (d + K)
    assert 0.5 * most <= temporary_numbers(factor(K, n, d), 8) <= most


def test_memory_of_the_metrics_is_one_chunk():
    K, d, chunk = 100, 256, 500

    def case(samples):
        def fn(*arrays):
            return collapse._metrics_in_chunks(
                *arrays, None, chunk_size=chunk, min_count=None
            )

        features = single((samples, d)), integer((samples,))
        return fn, *features, single((K, d)), single((K,))

    few, many = (temporary_numbers(case(samples), 4) for samples in (5000, 40000))
    assert many == pytest.approx(few, rel=0.01)
    assert chunk * (d + K) <= many <= 3 * chunk * (d + K) + 10 * K * d


def convolutions(model, image_shape, monkeypatch):
    """(input shape, kernel shape, stride, padding, output shape) of each."""
    seen = []

    def spy(x, kernel, stride, padding):
        y = convolution.convolve_lax(x, kernel, stride, padding)
        seen.append((x.shape, kernel.shape, stride, padding, y.shape))
        return y

    monkeypatch.setattr(models, "convolve", spy)
    variables = models.abstract_variables(model, image_shape)
    return seen, variables


def within_image(size, window, stride, padding, outputs):
    """Count positions of a window along one axis that are not padding."""
    return sum(
        0 <= i * stride + j - padding < size for i in range(outputs) for j in range(window)
    )


@pytest.mark.parametrize("name", ["resnet18", "vgg13"])
def test_training_takes_three_forward_passes(name, monkeypatch):
    model, shape, batch = models.build(name, 10), (32, 32, 3), 2
    layers, variables = convolutions(model, shape, monkeypatch)
    # XLA leaves out products with padding.
    operations = [
        2
        * np.prod(kernel[2:])
        * np.prod([within_image(x[a], kernel[a - 1], s, p, y[a]) for a in (1, 2)])
        for x, kernel, s, p, y in layers
    ]
    images = single((batch, *shape))

    def loss(trained, batch_stats, images):
        (logits, _), updated = model.apply(
            {"params": trained, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean(logits), updated

    forward = lowered((model.apply, variables, images))
    assert 1 <= forward / batch / sum(operations) <= 1.01
    gradient = jax.value_and_grad(loss, has_aux=True)
    step = lowered((gradient, variables["params"], variables["batch_stats"], images))
    # Images need no gradient.
    assert 1 <= step / batch / (3 * sum(operations) - operations[0]) <= 1.01


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "vgg13", "vgg16"])
def test_the_table_of_networks_holds_the_counts(name, monkeypatch):
    model, shape = models.build(name, 10), (32, 32, 3)
    layers, variables = convolutions(model, shape, monkeypatch)
    forward = sum(2 * y[1] * y[2] * np.prod(kernel) for _, kernel, _, _, y in layers)
    weights = models.count_parameters(model, shape)
    channels = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) // 2
    reduced = 4 * (weights + 3 * channels + 2)
    row = (
        f"| `{name}` | {weights} | {channels} | {forward / 1e9:.3f} | "
        f"{3 * forward / 1e9:.2f} | {reduced / 1e6:.1f} |"
    )
    assert row in PAGE.splitlines()


@pytest.fixture(scope="module")
def collectives():
    """Bytes that compiled programs send, by kind, on 2, 4 and 8 devices."""
    command = subprocesses.command("collectives", strict=True)
    return json.loads(subprocesses.output(command))


def test_a_training_step_sums_its_gradient_once(collectives):
    """It also sums loss, accuracy and batch statistics, on any number of devices."""
    mlp, convnet = (collectives["parameters"][name] for name in ("mlp", "convnet"))
    assert collectives["mlp"] == {"all-reduce": 4 * (mlp + 2)}
    assert collectives["convnet"] == [{"all-reduce": 4 * (convnet + 3 * (3 + 6) + 2)}] * 3
    assert collectives["three mlps"] == {"all-reduce": 3 * 4 * (mlp + 2)}


def test_an_evaluation_gathers_nothing_but_features(collectives):
    assert collectives["features"] == [{"all-gather": 4 * 32 * 51}] * 3


def test_statistics_are_merged_in_two_sums_of_class_means(collectives):
    K, d = 5, 7
    assert collectives["merge"] == [{"all-reduce": 4 * (2 * K * d + 3 * K + 6 * K)}] * 3


def test_seeds_of_the_flow_do_not_communicate(collectives):
    assert collectives["flow"] == {}
