"""Time a training step of ResNet18, and compare it with the device's matrix product."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import training_step
from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._accelerator_timing import Timing, costs, product_rate
from ncjax.networks import models, train

NUM_CLASSES = training_step.NUM_CLASSES
TINY_OPTIONS: dict[str, Any] = {"depths": (1,), "width": 1 / 32}
_REPEATS = 3  # timed epochs


class Case(NamedTuple):
    """A batch of CIFAR-10's size in one dtype."""

    batch: int
    dtype: str
    steps: int = 40  # of an epoch, which is one call


CASES = (Case(128, "bfloat16"), Case(512, "bfloat16"), Case(128, "float32"))
TINY = (Case(8, "float32", steps=2),)


def checks(setting: Setting) -> list[Check]:
    """Return a check for each batch size and dtype."""
    return [
        Check(
            f"ResNet18, batch {case.batch}, {case.dtype}",
            partial(_step, case, setting.tiny),
        )
        for case in (TINY if setting.tiny else CASES)
    ]


def problem(case: Case, tiny: bool) -> training_step.Problem:
    """Return the network, its options and the shape of the images."""
    options = {"dtype": jnp.dtype(case.dtype), **(TINY_OPTIONS if tiny else {})}
    shape = (8, 8, 3) if tiny else (32, 32, 3)
    return training_step.Problem("resnet18", options, shape, case.steps)


def _step(case: Case, tiny: bool) -> Finding:
    network = problem(case, tiny)
    timing, loss = _time_epochs(case, network)
    seconds = timing.seconds / case.steps
    peak = product_rate(case.dtype, 256 if tiny else 8192)
    model = models.build(network.name, NUM_CLASSES, **network.options)
    # A step is a forward pass and a backward pass, which costs two.
    flops = 3 * case.batch * forward_flops(model, network.image_shape)
    details = {
        "images_per_s": case.batch / seconds,
        "share_of_product": flops / seconds / peak,
        "product_TFLOP_per_s": peak / 1e12,
        **costs(timing),
    }
    return Finding(bool(np.isfinite(loss)), 1e3 * seconds, "ms/step", details)


def _time_epochs(case: Case, network: training_step.Problem) -> tuple[Timing, float]:
    """Return the seconds of an epoch, and the mean loss of the last one."""
    images, labels = training_step.draw(network, case.batch * case.steps)
    model, optimiser, mesh, dataset, state = training_step.set_up(network, images, labels)
    epoch = jax.jit(
        train.make_epoch(model, optimiser, batch_size=case.batch, mesh=mesh),
        donate_argnums=0,
    )
    seconds = []
    for number in range(1 + _REPEATS):
        started = time.perf_counter()
        state, log = epoch(state, dataset, jax.random.key(number))
        jax.block_until_ready(log)
        seconds.append(time.perf_counter() - started)
    return Timing(float(np.median(seconds[1:])), seconds[0]), float(log.loss)


def forward_flops(model, image_shape) -> int:
    """Return the operations of a forward pass of one image: two for each product.

    Convolutions and fully connected layers count, by the usual formula.
    """

    def run():
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(jax.random.key(0), images)
        _, seen = model.apply(
            variables, images, capture_intermediates=True, mutable=["intermediates"]
        )
        return variables["params"], seen["intermediates"]

    params, outputs = jax.eval_shape(run)
    total = 0
    for path, kernel in jax.tree.leaves_with_path(params):
        *layer, name = (entry.key for entry in path)
        if name == "kernel":
            output = outputs
            for key in layer:
                output = output[key]
            positions = output["__call__"][0].shape[1:-1]
            total += 2 * kernel.size * int(np.prod(positions))
    return total
