"""Programs stay small with many classes, and their work fits the platform and its memory.

There is no accelerator here: its branches run on the CPU, and its programs are lowered.
"""

import inspect
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subprocesses
from jax.sharding import Mesh

import ncjax
from experiments import _legs, _training, train_small, ulpm_flow
from experiments._runs import memory
from experiments._runs.errors import BadUse
from ncjax import checks, depth, measures, singular, sizes, statistics, variants
from ncjax.flow import block_solve
from ncjax.metrics import collapse, directions, tiles
from ncjax.networks import data, loss_clock, models, train

pytestmark = pytest.mark.usefixtures("quick_compilation")
GIGABYTE = 2**30


@pytest.fixture
def accelerated(monkeypatch):
    """Run the branches for accelerators on the CPU."""

    def branch(*arguments, default, cuda=None, cpu=None):
        return (cuda or default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", branch)
    monkeypatch.setattr(sizes, "platform_of", lambda *arrays: "gpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


def lowered(function, *arguments, platform="cpu", **settings):
    """The text of a program for a platform."""
    traced = jax.jit(function, **settings).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def single(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# Constants


K, N, D = 1000, 2000, 16
ARGUMENTS = {
    "features": single(N, D),
    "labels": integers(N),
    "W": single(K, D),
    "b": single(K),
    **dict.fromkeys(("rows", "others", "means"), single(K, D)),
    "ood_mean": single(D),
    "first_pass": jax.eval_shape(lambda: statistics.init(K, D)),
    "second_pass": jax.eval_shape(lambda: statistics.init_comparison(K)),
    "params": ncjax.Params(single(K, D), single(K, 2, D)),
    "fuzziness": single(5),
}
KNOWN = {"num_classes": K, "kernel": "log", "weight_decay": 0.1}
# They need known values, or return no array.
NOT_TRACED = {"one_vs_rest_distances", "nuclear_over_frobenius", "metrics_from_parts"}


def public_metrics():
    """Every function of the modules of metrics whose arguments have shapes above."""
    found = {}
    for module in (measures, variants, collapse, directions, depth):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__.startswith("ncjax.metrics") and name[0] != "_"
            if not own or name in NOT_TRACED or name.startswith("check"):
                continue
            required = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.default is parameter.empty
            ]
            if {*required} <= {*ARGUMENTS, *KNOWN}:
                found[name] = (function, required)
    return found


METRICS = public_metrics()


def test_the_metrics_tried_are_those_of_the_documentation():
    assert len(METRICS) > 30
    assert METRICS.keys() >= {"pair_cosines", "uniformity_kernel", "uniformity_moments"}
    assert METRICS.keys() >= {"collapse_metrics", "collapse_metrics_from_features"}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_a_thousand_classes_holds_no_table(name):
    function, required = METRICS[name]
    known = {key: KNOWN[key] for key in required if key in KNOWN}
    given = {key: ARGUMENTS[key] for key in required if key in ARGUMENTS}
    text = lowered(lambda given: function(**given, **known), given)
    assert sum(map(len, re.findall(r"dense<[^>]*>", text))) < 100_000
    assert len(text) < 300_000


@pytest.mark.parametrize("name", ["cosine_deviation", "uniformity_moments"])
def test_pairs_of_ten_thousand_classes_take_the_memory_of_tiles(name):
    function, required = METRICS[name]
    settings = {"kernel": "log"} if "kernel" in required else {}
    program = jax.jit(lambda rows: function(rows, **settings)).lower(single(10_000, D))
    used = program.compile().memory_analysis().temp_size_in_bytes
    assert used < 8 * 4 * tiles.TILE**2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 46, 301])
def test_entries_above_the_diagonal_come_in_the_order_of_numpy(size):
    matrix = np.arange(size * size).reshape(size, size)
    np.testing.assert_array_equal(
        tiles.above_diagonal(jnp.asarray(matrix)), matrix[np.triu_indices(size, 1)]
    )


def test_pairs_of_65535_rows_are_numbered_without_overflow():
    """At the ends of all rows, and in between."""
    size = 65535
    last = np.cumsum(np.arange(size - 1, 0, -1, dtype=np.int64)) - 1
    assert last[-1] < 2**31
    between = np.random.default_rng(0).integers(0, last[-1], 10**5)
    numbers = np.concatenate([last, last[:-1] + 1, between])
    paired = jax.jit(tiles._pair_of_rows, static_argnums=1)
    j, k = (np.asarray(x, np.int64) for x in paired(jnp.asarray(numbers, jnp.int32), size))
    assert ((j >= 0) & (j < k) & (k < size)).all()
    np.testing.assert_array_equal(j * (2 * size - 1 - j) // 2 + k - j - 1, numbers)


def test_pairs_of_tiles_come_in_the_order_of_numpy():
    pairs = jax.vmap(lambda number: tiles.pair_of_tiles(number, 7))(jnp.arange(28))
    np.testing.assert_array_equal(pairs, np.triu_indices(7))


# Sizes by platform


def chunk_of(platform, samples):
    """Samples of a chunk in the program of the metrics of 10 classes."""
    arguments = single(samples, D), integers(samples), single(10, D), single(10)
    text = lowered(ncjax.collapse_metrics_from_features, *arguments, platform=platform)
    slices = re.findall(rf"dynamic_slice .*-> tensor<(\d+)x{D}xf32>", text)
    return {int(size) for size in slices} - {1}


def test_chunks_follow_the_platform_of_the_program(monkeypatch):
    """Not the platform of the process that writes it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_cpu = 2**19 // (D + 10)
    assert chunk_of("cpu", 10**6) == {on_cpu}
    assert chunk_of("cuda", 10**6) == {sizes.CHUNK_BYTES // 4 // (D + 10)}


def test_arrays_lie_on_a_platform_unless_they_are_traced():
    assert sizes.platform_of(np.ones(2), jnp.ones(2)) == jax.default_backend()
    assert sizes.platform_of(np.ones(2), None) == jax.default_backend()
    traced = []
    jax.eval_shape(lambda x: traced.append(sizes.platform_of(x)), 1.0)
    assert traced == [None]


def test_an_evaluation_takes_images_by_bytes_on_accelerators_and_512_on_cpu():
    def images(platform, devices, size, shape):
        device = SimpleNamespace(platform=platform)
        return train.evaluation_chunk(size, shape, [device] * devices)

    assert images("cpu", 1, 10**5, (32, 32, 3)) == 512
    assert images("cpu", 3, 10**5, (224, 224, 3)) == 510
    assert images("gpu", 1, 10**5, (32, 32, 3)) == 1024
    assert images("gpu", 8, 10**5, (32, 32, 3)) == 8192
    assert images("tpu", 1, 10**5, (224, 224, 3)) == 20
    assert images("gpu", 1, 10**5, (10**5, 10**5, 3)) == 1
    assert images("gpu", 4, 3, (32, 32, 3)) == 4


# Branches for accelerators


def test_distances_in_groups_of_rows_are_those_of_one_row_at_a_time(accelerated):
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(37, 5)), rng.normal(size=(41, 5))
    expected = ((rows[:, None] - others[None]) ** 2).sum(axis=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "FEW_DIFFERENCES", 10)
        patch.setattr(sizes, "CHUNK_BYTES", 4 * 5 * others.size)  # 5 rows at a time
        got = tiles.squared_differences(jnp.asarray(rows), jnp.asarray(others))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_the_system_of_an_implicit_step_is_inverted_by_lu(accelerated):
    half = np.random.default_rng(0).normal(size=(12, 12))
    matrix = half @ half.T + np.eye(12)
    got = block_solve.inverse(jnp.asarray(matrix), block=4)
    np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=1e-8, atol=1e-10)


def test_a_density_in_groups_of_points_is_a_mixture_of_gaussians(accelerated, monkeypatch):
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 4 * 4 * 7)
    grid = jnp.linspace(-1.0, 4.0, 9)
    scales = np.arange(1.0, 5.0)
    density = ncjax.spectral_density(
        lambda x: jnp.sum(scales * x**2) / 2,
        jnp.ones(4),
        grid=grid,
        num_probes=1,
        width=0.5,
    )
    nodes, weights = np.ravel(density.nodes), np.ravel(density.weights)
    kernel = np.exp(-(((np.asarray(grid)[:, None] - nodes[None]) / 0.5) ** 2) / 2)
    expected = kernel @ weights / (0.5 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density.density, expected, rtol=1e-10)


def with_values(shape, values, dtype):
    """A random matrix with these singular values."""
    rng = np.random.default_rng(0)
    q = min(shape)
    left, right = (np.linalg.qr(rng.normal(size=(m, q)))[0] for m in shape)
    return ((left * np.resize(values, q)) @ right.T).astype(dtype)


MATRICES = {
    "equal values": ((40, 40), np.ones(40)),
    "spread of 1e6": ((40, 40), np.logspace(0, -6, 40)),
    "without full rank": ((40, 40), np.repeat([1, 0.1, 0], [20, 13, 7])),
    "of rank one": ((40, 40), np.repeat([1, 0], [1, 39])),
    "tall": ((90, 40), np.logspace(0, -3, 40)),
    "wide": ((40, 90), np.logspace(0, -3, 40)),
}
by_polar = jax.jit(singular.by_polar)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_products_give_singular_values_to_roundings_of_the_largest(name, dtype):
    matrix = with_values(*MATRICES[name], dtype)
    left, values, right = (np.asarray(x, np.float64) for x in by_polar(matrix))
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    rounding = 40 * np.finfo(dtype).eps * exact[0]
    assert (np.diff(values) <= 0).all()
    assert values[-1] >= 0
    np.testing.assert_allclose(values, exact, atol=rounding)
    np.testing.assert_allclose((left * values) @ right, matrix, atol=rounding)
    np.testing.assert_allclose(right @ right.T, np.eye(40), atol=rounding)
    top = exact > 1e-3 * exact[0]
    gram = left[:, top].T @ left[:, top]
    np.testing.assert_allclose(gram, np.eye(top.sum()), atol=1e3 * rounding)


def test_large_matrices_take_products_on_cuda_and_lapack_on_cpu():
    size = singular.LARGE
    for function in (singular.singular_values, singular.thin_svd):
        on_cuda = lowered(function, single(size, 2 * size), platform="cuda")
        assert "gesvd" not in on_cuda
        assert "cusolver_syevd" in on_cuda
        assert "gesdd" in lowered(function, single(size, 2 * size))
        assert "gesvdj" in lowered(function, single(size - 1, size), platform="cuda")


def test_large_singular_values_have_the_derivative_of_small_ones(monkeypatch):
    monkeypatch.setattr(singular, "LARGE", 10)
    matrix = with_values((12, 12), np.logspace(0, -2, 12), float)
    got = jax.grad(lambda x: singular.singular_values(x)[0])(jnp.asarray(matrix))
    left, _, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(got, np.outer(left[:, 0], right[0]), atol=1e-10)


# Copies to the host


def test_a_measurement_copies_no_features_to_the_host(accelerated, monkeypatch):
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(60) % 3, jnp.int32)
    features = jnp.asarray(rng.normal(size=(60, 41)), jnp.float32)
    params = {"classifier": {"kernel": jnp.asarray(rng.normal(size=(41, 3)), jnp.float32)}}
    copied = []

    def counted(function):
        def of_array(array, *args, **settings):
            if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
                copied.append(array.size)
            return function(array, *args, **settings)

        return of_array

    for module, name in ((np, "asarray"), (np, "array"), (np, "isfinite")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(jax, "device_get", counted(jax.device_get))
    values = _training._measure_one(features, params, labels, None)
    assert np.isfinite(list(values.values())).all()
    # Labels and class sizes go to the host, to be checked.
    assert 0 < max(copied, default=0) <= labels.size


def test_an_accelerator_counts_its_entries_that_are_not_finite(accelerated):
    array = jnp.asarray([[1.0, np.nan], [np.inf, -np.inf]])
    assert checks.count_not_finite(array) == 3
    with pytest.raises(ValueError, match="x must be finite, got 3 of 4 entries"):
        checks.check_finite("x", array)


# Memory of the devices


def device(limit, platform="gpu"):
    """A device that reports its memory."""
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats)


def test_the_smallest_device_decides_and_a_cpu_reports_nothing():
    assert sizes.device_memory([device(5), device(3)]) == 3
    assert sizes.device_memory([device(5), device(None)]) is None
    assert sizes.device_memory(jax.devices("cpu")) is None


def test_a_data_set_above_a_tenth_of_a_device_is_divided():
    def is_large(size, *limits):
        devices = np.array([device(limit) for limit in limits])
        return train._is_large(size, SimpleNamespace(size=len(devices), devices=devices))

    assert is_large(11, 100, 200)
    assert not is_large(9, 100, 200)
    assert not is_large(10**9, 100)  # nobody to share with
    assert not is_large(10**9, None, None)


def test_divided_data_give_the_batches_of_whole_data():
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
    }
    held = json.loads(
        subprocesses.output(subprocesses.command("divided_data"), environment)
    )
    assert held == {"whole": 61 * 16, "divided": 31 * 16}


def test_what_no_device_holds_is_refused_by_its_flags(monkeypatch):
    memory.check_devices(1e30, "--flags", None)
    memory.check_devices(1.0, "--flags", 2)
    with pytest.raises(BadUse, match=r"2 GB .* on each device, .* has 1 GB: .* --flags"):
        memory.check_devices(2e9, "--flags", 10**9)
    monkeypatch.setattr(sizes, "device_memory", lambda devices: 10**4)
    images = data.Dataset(np.zeros((1000, 8, 8, 1), np.uint8), np.arange(1000) % 10, 10)
    with pytest.raises(BadUse, match="--train_split, --test_split, --image_size"):
        _training._check_devices(train_small.Config(), models.build("mlp", 10), [images])
    with pytest.raises(BadUse, match="smaller --seeds, --num_classes"):
        _legs.check_memory(1000 * jax.device_count(), 10, 5, 20, 200)


# No float64 on a TPU


MESH = Mesh(np.asarray(jax.devices()[:1]), (train.AXIS,))


def computed_in_float64(text):
    """The operations of a program on float64; constants are only converted."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"[<x]f64>", line)]
    arrays = [line for line in lines if re.search(r"tensor<[\dx]+xf64>", line)]
    passed = r"(%\S+ = )?(stablehlo\.(constant|convert|return)|call|func|return)\b.*"
    return arrays + [line for line in lines if not re.fullmatch(passed, line)]


def programs(name, clock, dtype):
    """The programs of a training run."""
    model, shape = models.build(name, 10, width=0.05, dtype=dtype), (8, 8, 3)
    dataset = train.DeviceData(
        jax.ShapeDtypeStruct((64, *shape), jnp.uint8), integers(64), single(3), single(3)
    )
    optimiser = train.sgd(0.05, weight_decay=1e-4, drops=(3,))
    options = {"batch_size": 32, "mesh": MESH}
    key = jax.random.key(0)

    def start(key):
        state = train.init_state(model, optimiser, shape, key)
        return loss_clock.begin(state, jnp.float32(1), 0.1) if clock == "loss" else state

    state = jax.eval_shape(start, key)
    epoch = train.make_epoch(model, optimiser, augment=True, **options)
    if clock == "loss":
        epoch = loss_clock.make_epoch(model, **options)
    forward = train.make_forward(model, MESH)
    return {
        "start": (start, key),
        "epoch": (epoch, state, dataset, key),
        "forward": (forward, state, dataset, integers(32)),
    }


@pytest.mark.parametrize(
    ("name", "dtype", "parts"),
    [
        ("mlp", jnp.float32, ("start", "epoch", "forward")),
        ("resnet18", jnp.bfloat16, ("epoch",)),
    ],
)
def test_training_computes_nothing_in_float64(name, dtype, parts):
    assert jax.config.jax_enable_x64
    found = programs(name, "epoch", dtype)
    for part in parts:
        assert computed_in_float64(lowered(*found[part], platform="tpu")) == []


def test_the_clock_of_the_loss_has_one_number_in_float64():
    """The log of the time."""
    epoch = programs("mlp", "loss", jnp.float32)["epoch"]
    found = computed_in_float64(lowered(*epoch, platform="tpu"))
    assert found
    assert not any(re.search(r"tensor<[\dx]+xf64>", line) for line in found)


def test_measuring_a_network_computes_nothing_in_float64():
    """On a TPU JAX's own singular value decomposition holds a table in float64."""
    layer = single(64, 12), integers(64), single(10, 12), single(10)
    for function in (ncjax.collapse_metrics_from_features, ncjax.last_layer):
        assert computed_in_float64(lowered(function, *layer, platform="cuda")) == []
    assert computed_in_float64(lowered(ncjax.last_layer, *layer, platform="tpu")) == []


def test_a_run_in_float64_is_refused_on_a_tpu_with_the_flag_that_helps(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(BadUse, match=r"needs float64.*TPU.*--dtype=float32.*=cpu"):
        ulpm_flow._check(ulpm_flow.Config())
    ulpm_flow._check(ulpm_flow.Config(dtype="float32", init_scale=0.1))


def test_float64_on_a_tpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sizes, "platform_of", lambda *arrays: "tpu")
    with pytest.raises(ValueError, match=r"params must be float32 on a TPU.*cast it"):
        ncjax.hessian_eig(lambda x: jnp.sum(x**4), jnp.ones(3))
    with pytest.raises(ValueError, match=r"params must be float32 on a TPU.*cast it"):
        ncjax.gradient_flow(ncjax.init_params(jax.random.key(0), 2, 1, 2), [1.0])


def test_xla_knows_the_flag_of_the_same_bits_on_a_gpu():
    """An unknown flag would abort the process."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    (flag,) = set(re.findall(r"XLA_FLAGS=(--\S+?)`", page))
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    assert subprocesses.run(command, environment).returncode == 0
