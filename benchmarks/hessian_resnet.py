"""Time both ends of the Hessian of ResNet18, 11 million parameters, and its memory.

`hessian_eig(which="both", k=5, batches=...)` is called on the mean cross entropy of the
network with the imagenet stem on images of 28x28, in float32, with batch normalisation by
running averages. The network was trained for two epochs on noise around ten class means.
"""

import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks import training_step
from benchmarks._timing import Program, interleave, rows
from ncjax.networks import data, train
from ncjax.peeled import losses

IMAGES = 1000
BATCH = 100
EPOCHS = 2
K = 5
TOL = 1e-3
PROBLEM = training_step.PROBLEMS["ResNet18, 28x28, imagenet stem"]


def draw(count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw uint8 images (count, *shape) of ten overlapping classes, and labels."""
    rng = np.random.default_rng(0)
    labels = (np.arange(count) % 10).astype(np.int32)
    centres = rng.normal(size=(10, *shape))
    noise = rng.normal(size=(count, *shape))
    images = np.clip(128 + 40 * (0.25 * centres[labels] + noise), 0, 255)
    return images.astype(np.uint8), labels


def measure(
    repeats: int,
    problem: training_step.Problem = PROBLEM,
    images: int = IMAGES,
    tol: float = TOL,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes; one call, whatever `repeats` is: a call takes minutes."""
    pixels, labels = draw(images, problem.image_shape)
    model, optimiser, mesh, dataset, state = training_step.set_up(problem, pixels, labels)
    epoch = jax.jit(train.make_epoch(model, optimiser, batch_size=BATCH, mesh=mesh))
    for number in range(EPOCHS):
        state, _ = epoch(state, dataset, jax.random.key(number))

    def loss(params, batch):
        x, targets = batch
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, x, train=False)
        return jnp.mean(losses.softmax_cross_entropy(logits, targets))

    x = data.normalise(dataset.images, dataset.mean, dataset.deviation)
    batches = (x.reshape(-1, BATCH, *x.shape[1:]), dataset.labels.reshape(-1, BATCH))
    found: list[ncjax.HessianEig] = []

    def call(seed):
        eig = ncjax.hessian_eig(
            loss,
            state.params,
            batches=batches,
            k=K,
            which="both",
            tol=tol,
            key=jax.random.key(seed),
            progress=True,
        )
        found.append(jax.block_until_ready(eig))

    before = _peak_gigabytes()
    program = Program("ncjax hessian_eig, with compilation", call)
    interleave([program], 1)
    eig = found[0]
    values = np.asarray(eig.eigenvalues)
    more = {
        "dim": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "images": images,
        "tol": tol,
        "num_hvps": int(eig.num_hvps),
        "converged": bool(np.all(eig.converged)),
        "residuals": np.asarray(eig.residuals).tolist(),
        "eigenvalues": values.tolist(),
        "peak_gigabytes": _peak_gigabytes(),
        "peak_gigabytes_before": before,
    }
    program.note = (
        f"{more['num_hvps']} products, peak {more['peak_gigabytes']:.1f} GB of memory "
        f"({before:.1f} GB before), tol {tol:g}, "
        f"{'converged' if more['converged'] else 'not converged'}"
    )
    name = f"{problem.name}, {more['dim']} parameters, {images} images, 5 + 5 pairs"
    return rows(name, [program], **more), []


def _peak_gigabytes() -> float:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
