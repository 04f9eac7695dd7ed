"""Time a training step, batch 128, float32, against PyTorch on the same CPU.

A step runs forward, backward and the update of SGD with momentum. It shuffles the images,
takes them from a uint8 array in memory and normalises them. ncjax runs `train.make_epoch`.
PyTorch runs torchvision's networks in channels-last layout, eager and, where it works,
under `torch.compile`. Plain Flax runs ncjax's network with XLA's own convolution and
pooling, and calls a jitted step in a loop. Seconds are of one step; a call runs several.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import Program, interleave, missing, rows, warm_up
from ncjax.networks import convolution, data, models, train
from ncjax.peeled import losses

BATCH = 128
NUM_CLASSES = 10
LEARNING_RATE = 0.01
MEAN, DEVIATION = 0.5, 0.25
OPEN = "bfloat16 on a GPU, images per second and share of the matrix-product peak: open"


class Problem(NamedTuple):
    """A network of `ncjax.networks.models` and its images."""

    name: str
    options: dict[str, Any]
    image_shape: tuple[int, int, int]
    steps: int = 3  # steps per call: batches of an epoch


PROBLEMS = {
    "ResNet18, 28x28, imagenet stem": Problem(
        "resnet18", {"stem": "imagenet"}, (28, 28, 1), steps=10
    ),
    "ResNet18, 32x32, cifar stem": Problem("resnet18", {"stem": "cifar"}, (32, 32, 3)),
    "VGG13, 32x32": Problem("vgg13", {}, (32, 32, 3)),
}


def measure(
    repeats: int,
    problems: dict[str, Problem] = PROBLEMS,
    batch: int = BATCH,
    compiled: bool = True,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes of ncjax and its peers."""
    skipped = missing("torch", "torchvision")
    measured, notes = [], [OPEN] + ([skipped] if skipped else [])
    for name, problem in problems.items():
        images, labels = draw(problem, batch * problem.steps)
        programs = [
            ncjax_program(problem, images, labels, batch),
            flax_program(problem, images, labels, batch),
        ]
        if not skipped:
            programs.append(torch_program(problem, images, labels, batch))
        warm_up(programs)
        if not skipped and compiled:
            fast = torch_program(problem, images, labels, batch, compiled=True)
            try:
                warm_up([fast])
                programs.append(fast)
            except Exception as error:  # torch.compile raises whatever its parts raise
                reason = str(error).partition("\n")[0]
                notes.append(f"{name}: torch.compile does not work here ({reason})")
        interleave(programs, repeats)
        measured += rows(name, programs)
    return measured, notes


def measure_winograd(
    repeats: int, problems: dict[str, Problem] = PROBLEMS, batch: int = BATCH
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes of ncjax with and without Winograd's algorithm."""
    measured, loads = [], [os.getloadavg()[0]]
    for name, problem in problems.items():
        images, labels = draw(problem, batch * problem.steps)
        programs = [
            ncjax_program(problem, images, labels, batch),
            ncjax_program(problem, images, labels, batch, winograd=False),
        ]
        warm_up(programs)
        interleave(programs, repeats)
        measured += rows(name, programs)
        loads.append(os.getloadavg()[0])
    return measured, [f"load averages of the machine: {min(loads):.0f} to {max(loads):.0f}"]


def draw(problem: Problem, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw uint8 images of noise, and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(count, *problem.image_shape), dtype=np.uint8)
    return images, rng.integers(0, NUM_CLASSES, count).astype(np.int32)


def set_up(problem: Problem, images, labels, devices=1):
    """Return model, optimiser, mesh of `devices` devices, data on it and first state."""
    model = models.build(problem.name, NUM_CLASSES, **problem.options)
    optimiser = train.sgd(LEARNING_RATE)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), (train.AXIS,))
    channels = problem.image_shape[-1]
    mean, deviation = (np.full(channels, x, np.float32) for x in (MEAN, DEVIATION))
    dataset = data.Dataset(images, labels, NUM_CLASSES)
    on_device = train.on_device(dataset, mean, deviation, mesh)
    state = train.init_state(model, optimiser, problem.image_shape, jax.random.key(0))
    # Place it as an epoch returns it; else the second call would compile again.
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(state, everywhere)
    return model, optimiser, mesh, on_device, state


def ncjax_program(
    problem: Problem, images, labels, batch: int, winograd: bool = True
) -> Program:
    """Return `train.make_epoch` as a program, on all accelerators or one CPU device."""
    count = 1 if jax.default_backend() == "cpu" else jax.device_count()
    model, optimiser, mesh, dataset, state = set_up(problem, images, labels, count)
    epoch = jax.jit(
        train.make_epoch(model, optimiser, batch_size=batch, mesh=mesh), donate_argnums=0
    )
    convolve = partial(convolution.convolve, winograd=winograd)

    def call(repeat):
        nonlocal state
        with mock.patch.object(models, "convolve", convolve):  # used while tracing
            state, log = epoch(state, dataset, jax.random.key(repeat))
        return jax.block_until_ready(log)

    name = "ncjax" if winograd else "ncjax without Winograd"
    return Program(name, call, lambda: call(0), steps=len(labels) // batch)


def _reduce_window(x, size: int, stride: int, padding: int = 0):
    border = (padding, padding)
    return jax.lax.reduce_window(
        x,
        np.array(-np.inf, x.dtype),
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), border, border, (0, 0)),
    )


def flax_program(problem: Problem, images, labels, batch: int) -> Program:
    """Return plain Flax as a program: XLA's own convolution and pooling, step by step."""
    model, optimiser, _, dataset, state = set_up(problem, images, labels)

    def loss_of(params, batch_stats, x, targets):
        (logits, _), updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        loss = jnp.mean(losses.softmax_cross_entropy(logits, targets))
        return loss, updated["batch_stats"]

    def plain(x, kernel, stride=1, padding=0):
        return convolution.convolve_lax(x, kernel, stride, padding)

    @jax.jit
    def step(state, dataset, index):
        x = data.normalise(dataset.images[index], dataset.mean, dataset.deviation)
        gradient, batch_stats = jax.grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, x, dataset.labels[index]
        )
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return train.TrainState(params, batch_stats, opt_state)

    def call(repeat):
        nonlocal state
        order = np.random.default_rng(repeat).permutation(len(labels)).astype(np.int32)
        with (
            mock.patch.object(models, "convolve", plain),
            mock.patch.object(models, "max_pool", _reduce_window),
        ):
            for start in range(0, len(labels) - batch + 1, batch):
                state = step(state, dataset, order[start : start + batch])
        return jax.block_until_ready(state.params)

    steps = len(labels) // batch
    return Program("plain Flax", call, lambda: call(0), steps=steps)


def torch_network(problem: Problem):
    """Return torchvision's network with the same layers."""
    import torchvision
    from torch import nn

    channels = problem.image_shape[-1]
    if problem.name.startswith("vgg"):
        network = torchvision.models.get_model(
            f"{problem.name}_bn", num_classes=NUM_CLASSES
        )
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Linear(512, NUM_CLASSES)
        return network
    network = torchvision.models.get_model(problem.name, num_classes=NUM_CLASSES)
    network.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    if problem.options["stem"] == "cifar":
        network.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    return network


def torch_program(
    problem: Problem, images, labels, batch: int, compiled: bool = False
) -> Program:
    """Return PyTorch, in channels-last layout, as a program."""
    import torch

    torch.manual_seed(0)
    network = torch_network(problem).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
    forward: Callable = torch.compile(network) if compiled else network
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels-last in memory
    targets = torch.from_numpy(labels).long()

    def call(repeat):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(repeat))
        for index in order.split(batch):
            x = (pixels[index].float() / 255 - MEAN) / DEVIATION
            x = x.contiguous(memory_format=torch.channels_last)
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward(x), targets[index])
            loss.backward()
            optimiser.step()
        return loss.item()

    name = "PyTorch, torch.compile" if compiled else "PyTorch, eager"
    return Program(name, call, lambda: call(0), steps=len(labels) // batch)
