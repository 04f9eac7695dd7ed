"""Functions compile once where the documentation says so.

`chex.assert_max_traces` limits how often a function is traced. JAX may compile one trace
again for arrays on other devices; tests of whole runs count the programs that JAX logs.
"""

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import random_params

import ncjax
from experiments import _legs, train_small
from ncjax import statistics
from ncjax.curvature import landscape
from ncjax.networks import data, models, train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def traced_once(monkeypatch):
    """Fail if a function of a module, which each trace calls once, is traced again."""

    def limit(module, name):
        unlimited = getattr(module, name)

        def limited(*args, **settings):
            return unlimited(*args, **settings)

        monkeypatch.setattr(module, name, chex.assert_max_traces(limited, n=1))

    chex.clear_trace_counter()
    return limit


@pytest.fixture
def programs(caplog):
    """Names of the programs compiled so far, even if they come from the cache on disk."""

    def compiled():
        lines = (line.split() for line in caplog.messages)
        return [words[1] for words in lines if words[0] == "Compiling"]

    with jax.log_compiles():
        yield compiled


# The flow


def flow(seed, last, record=None, **settings):
    """A flow whose shapes do not depend on the arguments."""
    start = random_params(seed, 3, 2, 5, 0.3)
    return ncjax.gradient_flow(start, [1.0, last], record=record, **settings)


@pytest.mark.parametrize("solver", ["explicit", "implicit"])
def test_a_flow_is_compiled_once_for_all_starts_times_and_tolerances(traced_once, solver):
    traced_once(diffrax, "diffeqsolve")
    flow(0, 2.0, solver=solver)
    flow(1, 3.0, solver=solver, rtol=1e-6, atol=1e-7, start_log_time=0.5)


def test_a_flow_is_compiled_once_for_the_same_record(traced_once):
    traced_once(diffrax, "diffeqsolve")
    first = flow(0, 2.0, ncjax.margin_ratio)
    second = flow(1, 3.0, ncjax.margin_ratio)
    assert first.recorded[-1] != second.recorded[-1]


def test_another_record_is_compiled_anew(traced_once):
    """This also shows that the limit works."""
    traced_once(diffrax, "diffeqsolve")
    flow(0, 2.0, lambda state: ncjax.margin_ratio(state))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        flow(0, 2.0, lambda state: ncjax.margin_ratio(state))


def test_descent_is_compiled_once_for_all_step_sizes_and_numbers_of_steps():
    chex.clear_trace_counter()
    record = chex.assert_max_traces(lambda state: ncjax.margin_ratio(state), n=1)
    for seed, (step_size, steps) in enumerate([(0.1, 7), (0.2, 30)]):
        start = random_params(seed, 3, 2, 5, 0.3)
        ncjax.gradient_descent(start, step_size, steps, save_steps=[1, 5], record=record)


def test_all_legs_of_a_run_share_one_program(traced_once, programs, tmp_path):
    traced_once(diffrax, "diffeqsolve")
    keys = jax.random.split(jax.random.key(0), 2)
    starts = jax.vmap(lambda key: ncjax.init_params(key, 2, 1, 2))(keys)
    times = _legs.log_times(20.0, 20)
    (tmp_path / "config.json").write_text('{"config": {}}')
    columns, steps, _ = _legs.solve(starts, times, _legs.measure_collapse, tmp_path)
    assert len(steps) == _legs.LEGS
    assert np.isfinite(columns["log_loss"]).all()
    assert programs().count("jit(leg)") == 1
    assert programs().count("jit(measure_collapse)") == 1


# Curvature


def quartic(params, batch):
    return jnp.sum((params["a"] * batch) ** 4) + jnp.sum(params["b"] ** 2)


def point(seed):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=6)), "b": jnp.asarray(rng.normal(size=2))}
    return params, jnp.asarray(rng.normal(size=(3, 6)))


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_eigenvalues_are_compiled_once_for_the_same_function(traced_once, method):
    traced_once(landscape, "tangent_operator")
    for seed in range(2):
        params, batches = point(seed)
        settings = {"key": jax.random.key(seed), "tol": 10.0 ** -(6 + seed)}
        settings |= {"max_hvps": 100 + seed, "sphere": True, "method": method}
        ncjax.hessian_eig(quartic, params, batches=batches, **settings)


def test_eigenvalues_of_another_function_are_compiled_anew(traced_once):
    traced_once(landscape, "tangent_operator")
    ncjax.hessian_eig(lambda x: jnp.sum(x**4), jnp.ones(3))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        ncjax.hessian_eig(lambda x: jnp.sum(x**4), jnp.ones(3))


def test_a_density_is_compiled_once_for_the_same_function(traced_once):
    traced_once(landscape, "tangent_operator")
    for seed in range(2):
        params, batches = point(seed)
        settings = {"key": jax.random.key(seed), "num_probes": 2}
        ncjax.spectral_density(quartic, params, batches=batches, **settings)


# Features and networks


def test_metrics_are_compiled_once_for_features_of_one_shape(traced_once):
    traced_once(statistics, "reference")
    for seed in range(2):
        rng = np.random.default_rng(seed)
        features, labels = rng.normal(size=(23, 4)), rng.permutation(np.arange(23) % 3)
        W, b = rng.normal(size=(3, 4)), rng.normal(size=3)
        ncjax.collapse_metrics_from_features(features, labels, W, b, chunk_size=5)


def test_the_last_chunk_of_images_has_the_program_of_the_others(monkeypatch):
    """Features of 11 images, four at a time."""
    monkeypatch.setattr(train, "_CHUNK", 4)
    chex.clear_trace_counter()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), (train.AXIS,))
    model, shape = models.build("mlp", 10, width=0.05), (8, 8, 1)
    state = train.init_state(model, train.sgd(0.1), shape, jax.random.key(0))
    images = data.Dataset(np.zeros((11, *shape), np.uint8), np.arange(11) % 10, 10)
    dataset = train.on_device(images, np.float32([0]), np.float32([1]), mesh)
    forward = jax.jit(chex.assert_max_traces(train.make_forward(model, mesh), n=1))
    assert len(train.extract_features(forward, state, dataset)) == 11


def test_all_epochs_of_a_training_run_share_one_program(monkeypatch, programs, tmp_path):
    chex.clear_trace_counter()
    for name in ("make_epoch", "make_forward"):
        make = getattr(train, name)

        def limited(*args, make=make, **settings):
            return chex.assert_max_traces(make(*args, **settings), n=1)

        monkeypatch.setattr(train, name, limited)
    config = train_small.Config(
        train_split="train[:120]",
        test_split="",
        width=0.05,
        epochs=4,
        batch_size=40,
        measurements=4,
        workdir=str(tmp_path / "run"),
    )
    train_small.run(config)
    assert programs().count("jit(epoch)") == 1
    assert programs().count("jit(forward)") == 1
