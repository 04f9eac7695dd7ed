"""The loop of the published package `neural_collapse`, in plain PyTorch.

Three passes over batches, as its documentation says: means by a product with the class
memberships (B, K), the within-class covariance (d, d), and decisions by distances (B, K).
Then its measures: the trace with a pseudo-inverse (d, d), CDNV, norms, ETF and duality
errors. Arrays over pairs of classes are made in patches of rows, as the package can do. It
omits the bias, and squares norms, which loses the digits of features far from the origin.
"""

import torch

BATCH = 1000
PATCH = 1024


def measures(features, labels, W) -> dict[str, float]:
    """Return the package's numbers for features (N, d), labels (N,) and W (K, d)."""
    batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
    counts, means = _means(batches, W)
    variances, covariance = _variances(batches, means, counts)
    matched = _matches(batches, means, W) / len(labels)
    M = means - means.mean(0)
    between = M.T @ M / len(M)
    norms, weights = M.norm(dim=1), W.norm(dim=1)
    unit_M, unit_W = M / norms[:, None], W / weights[:, None]
    return {
        "variability": float((torch.linalg.pinv(between) @ covariance).trace() / len(M)),
        "cdnv": _mean_over_pairs(M, lambda rows, first: _cdnv(rows, first, M, variances)),
        "norms": float(norms.std() / norms.mean()),
        "weights": float(weights.std() / weights.mean()),
        "cosines": _mean_over_pairs(unit_M, lambda rows, _: rows @ unit_M.T),
        "classifier_cosines": _mean_over_pairs(unit_W, lambda rows, _: rows @ unit_W.T),
        "etf": _structure_error(M, M),
        "duality": _structure_error(W, M),
        "row_duality": float((unit_W - unit_M).norm(dim=1).mean()),
        "agreement": float(matched),
    }


def _members(labels, num_classes):
    return labels[:, None] == torch.arange(num_classes)


def _means(batches, W):
    counts, totals = torch.zeros(len(W)), torch.zeros_like(W)
    for x, y in batches:
        members = _members(y, len(W)).T.to(x.dtype)
        counts += members.sum(1)
        totals += members @ x
    return counts, totals / counts[:, None]


def _variances(batches, means, counts):
    totals, covariance = (
        torch.zeros(len(means)),
        torch.zeros(means.shape[1], means.shape[1]),
    )
    for x, y in batches:
        difference = x - means[y]
        covariance += difference.T @ difference
        totals.index_add_(0, y, difference.square().sum(1))
    return totals / counts, covariance / counts.sum()


def _matches(batches, means, W):
    matches, squares = 0, means.square().sum(1)
    for x, _ in batches:
        distances = x.square().sum(1)[:, None] + squares[None] - 2 * (x @ means.T)
        matches += (distances.argmin(1) == (x @ W.T).argmax(1)).sum()
    return matches


def _cdnv(rows, first, M, variances):
    distances = torch.cdist(rows, M).square()
    own = variances[first : first + len(rows)]
    return (own[:, None] + variances[None]) / (2 * distances)


def _mean_over_pairs(rows, of_patch) -> float:
    total = 0.0
    for first in range(0, len(rows), PATCH):
        values = of_patch(rows[first : first + PATCH], first)
        values.as_strided((len(values),), (len(rows) + 1,), first).zero_()
        total += float(values.sum())
    return total / len(rows) / (len(rows) - 1)


def _structure_error(rows, others) -> float:
    """Distance of the scaled product from the simplex, by patches of rows."""
    size, squares = len(rows), 0.0
    for first in range(0, size, PATCH):
        squares += float((rows[first : first + PATCH] @ others.T).square().sum())
    total = 0.0
    for first in range(0, size, PATCH):
        product = rows[first : first + PATCH] @ others.T / squares**0.5
        product += 1 / size / (size - 1) ** 0.5
        product.as_strided((len(product),), (size + 1,), first).sub_((size - 1) ** -0.5)
        total += float(product.square().sum())
    return total**0.5
