"""The whole public interface gives the same results under JAX's checks and devices."""

import interface
import jax
import numpy as np
import pytest
import subprocesses


def test_every_public_function_has_a_call():
    assert interface.public_names() == interface.CALLS.keys()


@pytest.mark.slow
def test_no_result_is_nan_or_infinite_on_the_way():
    """`test_placeholders.py` holds the model and its flow to this in every run.

    `ncjax.margins` is infinite by definition where no other class is compared.
    """
    names = interface.CALLS.keys() - {"geometry.margins"}
    with jax.debug_nans(True), jax.debug_infs(True):
        results = interface.evaluate(interface.points(), names)
    interface.assert_as_expected(results)


def test_compiled_functions_transfer_nothing_implicitly():
    inputs = interface.points()
    with jax.transfer_guard("disallow"):
        results = interface.evaluate(inputs, interface.COMPILED)
    interface.assert_as_expected(results)


@pytest.mark.slow
def test_under_jit_no_function_transfers_anything_implicitly():
    inputs = interface.points()
    with jax.transfer_guard("disallow"):
        results = interface.compiled(inputs)
        results |= interface.evaluate(inputs, [interface.OUTSIDE_JAX])
    assert results.keys() == interface.CALLS.keys() - set(interface.RETURNS_FLOATS)
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
    for name, result in results.items():
        if name not in (interface.OUTSIDE_JAX, *interface.RETURNS_FLOATS):
            assert all(x.dtype != np.float64 for x in jax.tree.leaves(result)), name
    for name in interface.RANDOM:  # draws depend on the dtype
        del results[name]
    interface.assert_as_expected(results, rtol=1e-3)


@pytest.mark.slow
def test_four_devices_give_the_same_results():
    subprocesses.output(subprocesses.command("strict_devices"))
