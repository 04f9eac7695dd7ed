"""No infinity and no NaN stands in for a number at a healthy point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_functions import compiled
from strategies import random_params, separating, sine_params

import ncjax
from experiments._saddles import Block
from ncjax import losses, variants

pytestmark = pytest.mark.usefixtures("quick_compilation")

POINTS = {"near": separating(0), "far": jax.tree.map(lambda leaf: 40 * leaf, separating(0))}
LABELS = np.repeat(np.arange(3), 2)


def _gradient(function):
    return lambda params: jax.grad(lambda p: jnp.sum(function(p)))(params)


def _last_layer(function):
    return lambda params: function(params.H.reshape(6, 4), LABELS, params.W)


def _of_logits(params):
    return losses.softmax_cross_entropy(params.H.reshape(6, 4), LABELS)


FUNCTIONS = {
    "margin_ratio": ncjax.margin_ratio,
    "gradient of margin_ratio": _gradient(ncjax.margin_ratio),
    "gradient of cross_entropy": _gradient(ncjax.cross_entropy),
    "gradient of log_cross_entropy": _gradient(ncjax.log_cross_entropy),
    "error_slopes": losses.error_slopes,
    "gradient of softmax_cross_entropy": _gradient(_of_logits),
    "kkt": ncjax.kkt,
    "kkt, nnls": lambda params: ncjax.kkt(params, multipliers="nnls"),
    "kkt_angle": ncjax.kkt_angle,
    "balance_norms": ncjax.balance_norms,
    "invariant_drift": lambda params: ncjax.invariant_drift(params, POINTS["near"]),
    "restore_invariants": lambda params: ncjax.restore_invariants(params, params),
    "last_layer": _last_layer(ncjax.last_layer),
    "logit_margins": _last_layer(variants.logit_margins),
    "cosine_margins": _last_layer(variants.cosine_margins),
    "gradient_descent": lambda params: ncjax.gradient_descent(params, 0.1, 10),
}


@pytest.fixture
def strict():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("point", POINTS)
def test_functions_of_a_point_have_no_placeholders(strict, point, name):
    jax.block_until_ready(FUNCTIONS[name](POINTS[point]))


@pytest.mark.parametrize("multipliers", ["softmax", "nnls"])
def test_certificates_have_no_placeholders(strict, multipliers):
    jax.block_until_ready(
        ncjax.certificate(Block(2, 2, 1, 4).params(30.0), multipliers=multipliers)
    )


def test_compiled_functions_have_no_placeholders(strict):
    jax.block_until_ready(compiled(random_params(0, 3, 2, 7, 1.0)))


@pytest.mark.parametrize("solver", ["explicit", "implicit"])
def test_the_flow_has_no_placeholders(strict, solver):
    flow = ncjax.gradient_flow(sine_params(), np.arange(5.0), solver=solver)
    jax.block_until_ready(flow)


def test_the_infinities_of_the_contract_are_reported(strict):
    with pytest.raises(FloatingPointError):
        ncjax.margins(POINTS["near"])
