"""Every compiled function lowers for CUDA and TPU, on any machine and without the host."""

import functools

import interface
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import random_params

import ncjax
from ncjax.flow.methods import METHODS
from ncjax.metrics import statistics
from ncjax.networks import convolution

pytestmark = pytest.mark.usefixtures("quick_compilation")

ACCELERATORS = ("cuda", "tpu")
# These compute in NumPy and SciPy, or return Python's numbers: `jax.jit` refuses them.
ON_THE_HOST = {interface.OUTSIDE_JAX, *interface.RETURNS_FLOATS}


def lowered(fn, *arrays, platforms=ACCELERATORS):
    """Return the program of a function for all platforms at once, as text."""
    return jax.export.export(jax.jit(fn), platforms=platforms)(*arrays).mlir_module()


def reason(name):
    """Return why a call of the public interface has no program, None if it has one."""
    inputs = interface.points()

    def call(rest):  # labels are known: `ncjax.peel` needs them
        return interface.CALLS[name](rest._replace(labels=inputs.labels))

    try:
        program = lowered(call, inputs._replace(labels=None))
    except (TypeError, ValueError, NotImplementedError) as error:
        return type(error)
    return "callback" if "callback" in program else None


@pytest.mark.parametrize("name", sorted(interface.CALLS))
def test_every_public_function_lowers_but_those_on_the_host(name):
    assert (reason(name) is None) == (name not in ON_THE_HOST)


TIMES = np.array([0.5, 1.0])


@pytest.mark.parametrize("solver", METHODS)
def test_the_flow_lowers_with_every_solver_under_vmap(solver):
    start = random_params(0, 3, 2, 4, 0.3)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), start)

    def flow(start, times):
        return ncjax.gradient_flow(start, times, solver=solver, weights=np.ones(3))

    assert "callback" not in lowered(jax.vmap(flow, (0, None)), many, TIMES)


def test_the_flow_of_several_layers_lowers():
    start = ncjax.init_deep_params(jax.random.key(0), 3, 2, (4, 5))
    flow = functools.partial(ncjax.gradient_flow, record=ncjax.squared_norm)
    assert "callback" not in lowered(flow, start, TIMES)


@pytest.mark.slow
def test_the_gradient_of_the_flow_lowers():
    def last(start):
        return jnp.sum(ncjax.gradient_flow(start, TIMES, max_steps=100).final.W ** 2)

    assert "callback" not in lowered(jax.grad(last), random_params(0, 3, 2, 4, 0.3))


def test_a_bar_of_progress_needs_the_host():
    pytest.importorskip("tqdm")
    flow = functools.partial(ncjax.gradient_flow, progress=True)
    with pytest.raises(NotImplementedError, match="callback"):
        lowered(flow, random_params(0, 3, 2, 4, 0.3), TIMES)


# Formulas that differ between platforms


def test_a_program_for_a_cpu_leaves_the_multipliers_to_scipy():
    def conditions(params):
        return ncjax.kkt(params, multipliers="nnls")

    program = jax.jit(conditions).lower(random_params(0, 3, 2, 4, 0.3)).as_text()
    assert "callback" in program
    assert "stablehlo.while" not in program


def _loss(x, kernel):
    y = convolution.max_pool(convolution.convolve(x, kernel, padding=1), 2, 2)
    return jnp.sum(y**2)


def test_a_program_holds_the_formulas_of_its_platform_alone():
    """XLA's own convolution and pooling on accelerators, Winograd's products on CPU."""
    x, kernel = jnp.ones((6, 13, 9, 16)), jnp.ones((3, 3, 16, 17))
    gradient = jax.grad(_loss, (0, 1))
    for platform in ("cpu", *ACCELERATORS):
        program = lowered(gradient, x, kernel, platforms=(platform,))
        own = {"stablehlo.convolution", "stablehlo.select_and_scatter"}
        found = {name for name in own if name in program}
        assert found == (set() if platform == "cpu" else own)


def test_class_sums_are_additions_on_cpu_and_a_product_elsewhere():
    x, labels = jnp.ones((12, 3)), jnp.arange(12, dtype=jnp.int32) % 4

    def sums(x, labels):
        return statistics._class_sums(x, labels, labels >= 0, 4)

    for platform in ("cpu", *ACCELERATORS):
        program = lowered(sums, x, labels, platforms=(platform,))
        assert ("stablehlo.scatter" in program) == (platform == "cpu")
        assert ("stablehlo.dot_general" in program) == (platform != "cpu")
