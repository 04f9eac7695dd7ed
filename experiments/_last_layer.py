"""Describe a last layer as a point of the layer-peeled model."""

import math
from typing import Any

import jax.numpy as jnp

import ncjax

# Residual of the least eigenvalue, whose error is about the square of this.
_CURVATURE = 1e-6


def describe(params: ncjax.Params) -> dict[str, Any]:
    """Return margins, KKT residuals, certificate and least eigenvalue of a point."""
    num_classes, per_class, dim = params.H.shape
    labels = jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), per_class)
    layer = ncjax.last_layer(params.H.reshape(-1, dim), labels, params.W)
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, sphere=True, tol=_CURVATURE)
    description: dict[str, Any] = {
        "squared_norm": float(ncjax.squared_norm(params)),
        "log_loss": float(layer.log_loss),
        "least_margin": float(layer.least_margin),
        "margin_ratio": float(layer.margin_ratio),
        "balanced_margin_ratio": float(layer.balanced_margin_ratio),
        "kkt_angle": float(layer.kkt_angle),
        "balanced_kkt_angle": float(layer.balanced_kkt_angle),
        "smallest_riemannian_eigenvalue": float(eig.eigenvalues[0]),
    }
    if layer.least_margin > 0:
        certificate = ncjax.certificate(params)
        kkt = ncjax.kkt(params)
        description |= {
            "kkt_stationarity": float(kkt.stationarity),
            "kkt_complementarity": float(kkt.complementarity),
            "sigma_max": float(certificate.sigma_max),
            "duality_gap": float(certificate.gap),
            "excess_over_the_minimum_norm": float(certificate.excess),
            "verdict": ncjax.VERDICTS[int(certificate.verdict)],
        }
    else:
        undefined = ("kkt_stationarity", "kkt_complementarity", "sigma_max", "duality_gap")
        description |= dict.fromkeys((*undefined, "excess_over_the_minimum_norm"), math.nan)
        description["verdict"] = ncjax.VERDICTS[ncjax.separation.NOT_SEPARATED]
    return description | {
        name: float(value)
        for name, value in ncjax.collapse_metrics(params)._asdict().items()
    }
