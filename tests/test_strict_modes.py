"""The whole public interface gives the same results under JAX's checks and devices."""

import interface
import jax
import numpy as np
import pytest
import subprocesses

# Compiled by themselves, so that they need no `jax.jit` for explicit transfers alone.
COMPILED = (
    "collapse.collapse_metrics",
    "collapse.collapse_metrics_from_features",
    "descent.gradient_descent",
    "landscape.hessian_eig",
    "landscape.spectral_density",
    "peeling.last_layer",
    "statistics.class_statistics",
    "statistics.squared_distances",
    "variants.ncc_agreement",
    "variants.nearest_centre_accuracy",
    "variants.within_class_variation",
)
OUTSIDE_JAX = "variants.one_vs_rest_distances"


def test_every_public_function_has_a_call():
    assert interface.public_names() == interface.CALLS.keys()


def test_no_result_is_nan_or_infinite_on_the_way():
    """`ncjax.margins` is infinite by definition where no other class is compared."""
    names = interface.CALLS.keys() - {"geometry.margins"}
    with jax.debug_nans(True), jax.debug_infs(True):
        interface.assert_as_expected(interface.evaluate(interface.points(), names))


def test_compiled_functions_transfer_nothing_implicitly():
    inputs = interface.points()
    with jax.transfer_guard("disallow"):
        results = interface.evaluate(inputs, COMPILED)
    interface.assert_as_expected(results)


def test_under_jit_no_function_transfers_anything_implicitly():
    inputs = interface.points()
    names = interface.CALLS.keys() - {OUTSIDE_JAX}

    @jax.jit
    def all_of(inputs, key):
        inputs = inputs._replace(labels=labels, key=key)
        return {name: interface.CALLS[name](inputs) for name in names}

    labels = inputs.labels  # known, because ncjax.peel needs them
    with jax.transfer_guard("disallow"):
        results = jax.device_get(all_of(inputs._replace(labels=None), inputs.key))
        results |= interface.evaluate(inputs, [OUTSIDE_JAX])
    interface.assert_as_expected(results)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [jax.checking_leaks, jax.disable_jit])
def test_no_tracer_leaks_and_every_loop_runs_in_python(mode):
    with mode():
        results = interface.evaluate(interface.points())
    interface.assert_as_expected(results)


@pytest.mark.slow
def test_float32_without_x64_promotes_nothing():
    """The suite refuses promotion of dtype and rank everywhere, see conftest.py."""
    with jax.enable_x64(False):
        results = interface.evaluate(interface.points(np.float32))
    interface.assert_as_expected(results, rtol=1e-3)
    for leaf in jax.tree.leaves(results):
        assert leaf.dtype != np.float64


@pytest.mark.slow
def test_four_devices_give_the_same_results():
    subprocesses.output(subprocesses.command("strict_devices"))
