"""Time spectra of the Hessian of ResNet18, with the batch normalisation of training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._accelerator_step import NUM_CLASSES, TINY_OPTIONS
from benchmarks._accelerator_timing import costs, timed
from ncjax.networks import models
from ncjax.peeled import losses

IMAGES, TINY_IMAGES = (128, 32, 32, 3), (8, 8, 8, 3)
TOL = 1e-3


def checks(setting: Setting) -> list[Check]:
    """Return the checks of curvature."""
    tiny = setting.tiny
    return [
        Check("largest eigenvalue of ResNet18", partial(_largest, tiny)),
        Check("spectral density of ResNet18, 1 probe", partial(_density, tiny)),
    ]


def _problem(tiny: bool):
    """Return loss, parameters, and batches of noise."""
    model = models.build("resnet18", NUM_CLASSES, **(TINY_OPTIONS if tiny else {}))
    shape = TINY_IMAGES if tiny else IMAGES
    images = jax.random.normal(jax.random.key(0), (1, *shape), jnp.float32)
    labels = jnp.arange(shape[0], dtype=jnp.int32)[None] % NUM_CLASSES
    variables = model.init(jax.random.key(1), images[0, :1])

    def loss(params, batch):
        x, targets = batch
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        (logits, _), _ = model.apply(state, x, train=True, mutable=["batch_stats"])
        return jnp.mean(losses.softmax_cross_entropy(logits, targets))

    return loss, variables["params"], (images, labels)


def _largest(tiny: bool) -> Finding:
    loss, params, batches = _problem(tiny)
    call = partial(
        ncjax.hessian_eig,
        loss,
        params,
        batches=batches,
        which="largest",
        max_hvps=30 if tiny else 200,
        tol=TOL,
    )
    found, timing = timed(call, repeats=1)
    hvps = int(found.num_hvps)
    details = {
        "seconds": timing.seconds,
        "hvps": hvps,
        "value": found.eigenvalues[-1],
        "residual": np.max(found.residuals),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **costs(timing),
    }
    converged = tiny or bool(np.all(found.converged))
    return Finding(converged, 1e3 * timing.seconds / hvps, "ms/product", details)


def _density(tiny: bool) -> Finding:
    loss, params, batches = _problem(tiny)
    call = partial(
        ncjax.spectral_density,
        loss,
        params,
        batches=batches,
        num_probes=1,
        num_steps=8 if tiny else 64,
    )
    found, timing = timed(call, repeats=1)
    is_finite = bool(np.isfinite(np.asarray(found.density)).all())
    return Finding(is_finite, timing.seconds, "s", costs(timing))
