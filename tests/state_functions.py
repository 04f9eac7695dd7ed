"""Functions of a state of the layer-peeled model, each compiled once per shape."""

import jax

import ncjax

SCALARS = {
    "cross_entropy": ncjax.cross_entropy,
    "log_cross_entropy": ncjax.log_cross_entropy,
    "squared_norm": ncjax.squared_norm,
    "margin_ratio": ncjax.margin_ratio,
    "kkt_angle": ncjax.kkt_angle,
    "metrics": ncjax.collapse_metrics,
}


def of_state(params):
    """Return the value of every function of SCALARS."""
    return {name: function(params) for name, function in SCALARS.items()}


compiled = jax.jit(of_state)
certificate = jax.jit(ncjax.certificate, static_argnames="multipliers")
kkt = jax.jit(ncjax.kkt, static_argnames="multipliers")
