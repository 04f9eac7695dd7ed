"""Time all collapse metrics of a set of features, float32, against PyTorch.

ncjax computes them in one call, and in batches by `CollapseMeter` with its second pass. The
first peer computes the same 15 numbers in whole-array PyTorch: one pass of means and
deviations, the pseudo-inverse of the between-class covariance by the singular values of the
class means, distances to the centres by one product. It needs arrays (N, K), so it is left
out at many classes. The second peer is the batched loop of the published package
(`benchmarks._published_loop`), which reports ten numbers and no accuracy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._timing import Program, interleave, missing, rows, warm_up
from ncjax.metrics.tiles import FEW_CLASSES

BATCH = 1000
# Whole arrays (N, K) of more entries do not fit into memory.
WHOLE = 2**30


class Problem(NamedTuple):
    """Numbers of classes, feature dimensions and samples."""

    num_classes: int
    dim: int
    samples: int


PROBLEMS = {
    "K=10, d=512, N=50000": Problem(10, 512, 50_000),
    "K=100, d=512, N=50000": Problem(100, 512, 50_000),
    "K=10, d=4096, N=10000": Problem(10, 4096, 10_000),
    "K=1000, d=2048, N=20000": Problem(1000, 2048, 20_000),
    "K=30000, d=512, N=36000": Problem(30_000, 512, 36_000),
}


def draw(problem: Problem):
    """Draw float32 features around Gaussian class means, labels, and a classifier."""
    num_classes, dim, samples = problem
    rng = np.random.default_rng(0)
    labels = (np.arange(samples) % num_classes).astype(np.int32)
    means = rng.normal(size=(num_classes, dim)).astype(np.float32)
    features = means[labels] + rng.normal(size=(samples, dim)).astype(np.float32)
    weight = means + rng.normal(size=means.shape).astype(np.float32)
    return features, labels, weight, np.zeros(num_classes, np.float32)


def measure(
    repeats: int, problems: dict[str, Problem] = PROBLEMS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes."""
    measured, skipped = [], missing("torch")
    for name, problem in problems.items():
        arrays = draw(problem)
        programs = [_ncjax(arrays), _meter(arrays)]
        if not skipped:
            programs.append(_published(arrays))
            if problem.samples * problem.num_classes <= WHOLE:
                programs.append(_vectorised(arrays))
        warm_up(programs)
        interleave(programs, repeats)
        measured += rows(name, programs)
    return measured, [skipped] if skipped else []


def _ncjax(arrays) -> Program:
    arrays = tuple(map(jnp.asarray, arrays))

    def call(_):
        return jax.block_until_ready(ncjax.collapse_metrics_from_features(*arrays))

    compiled = jax.jit(ncjax.collapse_metrics_from_features).lower(*arrays).compile()
    note, memory = "", compiled.memory_analysis()
    # Many classes run in several programs, not in this one.
    if memory is not None and len(arrays[2]) <= FEW_CLASSES:
        features = arrays[0].nbytes
        note = f"{memory.temp_size_in_bytes / 1e6:.0f} MB beyond {features / 1e6:.0f} MB"
    return Program("ncjax", call, lambda: call(0), note)


def _meter(arrays) -> Program:
    features, labels, W, b = arrays
    num_classes, dim = W.shape

    def take(counter):
        for start in range(0, len(labels), BATCH):
            rows = slice(start, start + BATCH)
            counter.update(features[rows], labels[rows])
        return counter

    def call(_):
        meter = take(ncjax.CollapseMeter(num_classes, dim, within_scatter=False))
        return take(meter.second_pass(W, b)).compute()

    note = f"two passes over batches of {BATCH} from NumPy"
    return Program("ncjax, CollapseMeter", call, lambda: call(0), note)


def _vectorised(arrays) -> Program:
    import torch

    tensors = tuple(map(torch.from_numpy, arrays))

    def call(_):
        return torch_metrics(*tensors)

    return Program("PyTorch, whole arrays", call, lambda: call(0))


def _published(arrays) -> Program:
    import torch

    from benchmarks import _published_loop

    features, labels, W, _ = map(torch.from_numpy, arrays)

    def call(_):
        return _published_loop.measures(features, labels.long(), W)

    return Program("PyTorch, the published package's loop", call, lambda: call(0))


def _class_means(features, labels, num_classes):
    import torch

    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def torch_metrics(features, labels, W, b) -> dict[str, float]:
    """Return the fields of `CollapseMetrics` by the plain formulas."""
    import torch

    num_classes = len(W)
    means = _class_means(features, labels, num_classes)
    centred, centred_W = means - means.mean(0), W - W.mean(0)
    deviations = features - means[labels]
    squares = deviations.square().sum(1)
    counts = torch.bincount(labels, minlength=num_classes)
    variances = torch.zeros(num_classes).index_add_(0, labels, squares) / counts
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    kept = singular > num_classes * 1.2e-7 * singular.max()
    whitened = deviations @ (right[kept] / singular[kept, None]).T
    j, k = torch.triu_indices(num_classes, num_classes, 1)
    distances = torch.cdist(centred, centred).square()[j, k]
    decided = (features @ W.T + b).argmax(1)
    nearest = torch.cdist(features, means).argmin(1)
    etf = torch.eye(num_classes) - 1 / num_classes
    etf = etf / torch.linalg.norm(etf)

    def variation(rows):
        norms = rows.norm(dim=1)
        return norms.std() / norms.mean()

    def cosine_deviation(rows):
        unit = rows / rows.norm(dim=1, keepdim=True)
        return ((unit @ unit.T)[j, k] + 1 / (num_classes - 1)).abs().mean()

    def etf_error(rows, others):
        product = rows @ others.T
        return torch.linalg.norm(product / torch.linalg.norm(product) - etf)

    def duality(rows, others):
        return torch.linalg.norm(
            rows / torch.linalg.norm(rows) - others / torch.linalg.norm(others)
        )

    found = {
        "within_class_variation": whitened.square().sum() / len(labels),
        "within_class_quotient": squares.mean() / centred.square().sum(1).mean(),
        "cdnv": ((variances[j] + variances[k]) / (2 * distances)).mean(),
        "mean_norm_variation": variation(centred),
        "classifier_norm_variation": variation(W),
        "centred_classifier_norm_variation": variation(centred_W),
        "mean_cosine_deviation": cosine_deviation(centred),
        "classifier_cosine_deviation": cosine_deviation(W),
        "centred_classifier_cosine_deviation": cosine_deviation(centred_W),
        "etf_gram_error": etf_error(centred, centred),
        "self_duality": duality(W, centred),
        "centred_self_duality": duality(centred_W, centred),
        "product_etf_error": etf_error(W, centred),
        "ncc_mismatch": (decided != nearest).float().mean(),
        "accuracy": (decided == labels).float().mean(),
    }
    return {name: float(value) for name, value in found.items()}
