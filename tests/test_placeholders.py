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
from ncjax.peeled import kernels

pytestmark = pytest.mark.usefixtures("quick_compilation")

POINTS = {"near": separating(0), "far": jax.tree.map(lambda leaf: 40 * leaf, separating(0))}
LABELS = np.repeat(np.arange(3), 2)


WEIGHTS = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 0.5]])


def losses_of(params, weights):
    """Losses that take weights, summed."""
    plain = ncjax.cross_entropy(params, weights) + ncjax.log_cross_entropy(params, weights)
    focal = ncjax.Objective("focal", gamma=2.0).log_loss(params, weights)
    focal = focal + losses.log_focal_loss(params, 2.0, weights)
    return plain + focal + kernels.log_loss(params, jnp.asarray(weights), 2.0)


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
    "weighted losses": lambda params: losses_of(params, WEIGHTS),
    "gradient of weighted losses": _gradient(lambda params: losses_of(params, WEIGHTS)),
    "weighted error_slopes": lambda params: losses.error_slopes(params, WEIGHTS),
    "weighted margin_ratio": lambda params: ncjax.margin_ratio(params, WEIGHTS),
    "weighted kkt": lambda params: ncjax.kkt(params, WEIGHTS),
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


@pytest.mark.parametrize(
    ("solver", "left_out"), [("explicit", 0), ("implicit", 0), ("implicit", 1)]
)
def test_the_flow_has_no_placeholders(strict, solver, left_out):
    weights = np.ones((4, 3)) - np.eye(4, 3) if left_out else None
    flow = ncjax.gradient_flow(
        sine_params(), np.arange(5.0), weights=weights, solver=solver
    )
    jax.block_until_ready(flow)


def test_the_infinities_of_the_contract_are_reported(strict):
    with pytest.raises(FloatingPointError):
        ncjax.margins(POINTS["near"])
