r"""Collapse metrics in plain NumPy, written from their definitions, in float64.

Loops wherever a loop is the plainest reading of the formula; speed is no aim. Features
h_i (N, d) with labels y_i, class means m_k of n_k samples, global mean h_G, classifier
rows w_k. `centring` defines h_G: "class_mean" is the mean of the m_k, "sample_mean" the
mean of all h_i. Pairs are unordered pairs of different classes.
"""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    features: np.ndarray  # (N, d)
    labels: np.ndarray  # (N,)
    W: np.ndarray  # (K, d)
    b: np.ndarray  # (K,)
    ood_features: np.ndarray | None = None
    ood_labels: np.ndarray | None = None


# The published arrays on which the values of tests/data/collapse_values.json are computed.
FEATURES = Path(__file__).parents[1] / "results" / "reference_features"
with np.load(FEATURES / "clusters.npz") as clusters:
    REFERENCE = Data(*(clusters[name] for name in Data._fields))


def float64(data):
    """The same numbers, floating arrays in float64."""

    def widen(array):
        floating = array is not None and array.dtype.kind == "f"
        return array.astype(np.float64) if floating else array

    return Data(*(widen(None if array is None else np.asarray(array)) for array in data))


# Building blocks


def class_means(features, labels):
    return np.array([features[labels == k].mean(axis=0) for k in np.unique(labels)])


def global_mean(features, labels, centring):
    rows = {"class_mean": class_means(features, labels), "sample_mean": features}
    return rows[centring].mean(axis=0)


def centred_means(features, labels, centring="class_mean"):
    return class_means(features, labels) - global_mean(features, labels, centring)


def centred_rows(rows):
    return rows - rows.mean(axis=0)


def unit_rows(rows):
    return np.array([row / np.linalg.norm(row) for row in rows])


def unit_matrix(matrix):
    return matrix / np.linalg.norm(matrix)


def pseudo_inverse(matrix):
    """Moore-Penrose inverse of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    cutoff = len(matrix) * np.finfo(np.float64).eps * values.max()
    result = np.zeros_like(matrix)
    for value, vector in zip(values, vectors.T, strict=True):
        if value > cutoff:
            result += np.outer(vector, vector) / value
    return result


def within_covariance(features, labels, weighting="sample"):
    """Mean over samples, or over classes of the mean over their samples."""
    means = class_means(features, labels)
    total = np.zeros((features.shape[1], features.shape[1]))
    for k, mean in enumerate(means):
        members = features[labels == k]
        scatter = sum(np.outer(h - mean, h - mean) for h in members)
        share = {"sample": 1 / len(features), "class": 1 / len(members) / len(means)}
        total += scatter * share[weighting]
    return total


def between_covariance(features, labels, centring="class_mean"):
    means = centred_means(features, labels, centring)
    return sum(np.outer(mean, mean) for mean in means) / len(means)


def pair_cosines(rows):
    unit = unit_rows(rows)
    return np.array([unit[j] @ unit[k] for j, k in combinations(range(len(unit)), 2)])


def etf_gram(size):
    return (np.eye(size) - np.ones((size, size)) / size) / np.sqrt(size - 1)


def logits(data, bias=True):
    product = data.features @ data.W.T
    return product + data.b if bias else product


def nearest_centres(features, labels):
    means = class_means(features, labels)
    return np.array([np.argmin([np.linalg.norm(h - m) for m in means]) for h in features])


# NC1


def within_class_variation(
    features, labels, centring="class_mean", weighting="sample", per_class=True
):
    inverse = pseudo_inverse(between_covariance(features, labels, centring))
    trace = np.trace(within_covariance(features, labels, weighting) @ inverse)
    return trace / len(np.unique(labels)) if per_class else trace


def within_class_quotient(features, labels, centring="class_mean"):
    within = np.trace(within_covariance(features, labels))
    return within / np.trace(between_covariance(features, labels, centring))


def cdnv(features, labels, power=1):
    means = class_means(features, labels)
    variance = [
        np.mean([np.sum((h - mean) ** 2) for h in features[labels == k]])
        for k, mean in enumerate(means)
    ]
    pairs = combinations(range(len(means)), 2)
    return np.mean(
        [
            (variance[j] + variance[k]) / (2 * np.sum((means[j] - means[k]) ** 2) ** power)
            for j, k in pairs
        ]
    )


def variability_collapse_index(features, labels, centring="sample_mean"):
    between = between_covariance(features, labels, centring)
    total = within_covariance(features, labels) + between
    rank = min(features.shape[1], len(np.unique(labels)) - 1)
    return 1 - np.trace(pseudo_inverse(total) @ between) / rank


def nuclear_over_frobenius(features, labels, power=1):
    values = []
    for k in np.unique(labels):
        singular = np.linalg.svd(features[labels == k], compute_uv=False)
        values.append((singular.sum() / np.sqrt(np.sum(singular**2))) ** power)
    return np.mean(values)


def average_squared_norm(features, labels):
    centre = features.mean(axis=0)
    return np.mean(
        [
            np.mean([np.sum((h - centre) ** 2) for h in features[labels == k]])
            for k in np.unique(labels)
        ]
    )


# NC2 of the rows of a matrix


def norm_variation(rows, ddof=1):
    norms = np.array([np.linalg.norm(row) for row in rows])
    std = np.sqrt(np.sum((norms - norms.mean()) ** 2) / (len(norms) - ddof))
    return std / norms.mean()


def cosine_deviation(rows):
    return np.mean(np.abs(pair_cosines(rows) + 1 / (len(rows) - 1)))


def etf_gram_error(rows):
    return np.linalg.norm(unit_matrix(rows @ rows.T) - etf_gram(len(rows)))


def uniformity_kernel(rows, kernel):
    unit, power = unit_rows(rows), rows.shape[1] - 2
    values = []
    for j, k in combinations(range(len(unit)), 2):
        r = np.linalg.norm(unit[j] - unit[k])
        kernels = {
            "distance": lambda r: r,
            "log": lambda r: np.log(1 / r),
            "riesz": lambda r: np.copysign(1.0, power) / r**power,
        }
        values.append(kernels[kernel](r))
    return np.array(values)


# NC3 of a classifier and class means, NC4


def self_duality(rows, others, squared=False):
    distance = np.linalg.norm(unit_matrix(rows) - unit_matrix(others))
    return distance**2 if squared else distance


def product_etf_error(rows, others):
    return np.linalg.norm(unit_matrix(rows @ others.T) - etf_gram(len(rows)))


def row_cosines(rows, others):
    pairs = zip(unit_rows(rows), unit_rows(others), strict=True)
    return np.array([row @ other for row, other in pairs])


def row_dots(rows, others):
    return np.array([row @ other for row, other in zip(rows, others, strict=True)])


def ncc_agreement(data, bias=True):
    """Share of each class on which classifier and nearest class mean agree."""
    nearest = nearest_centres(data.features, data.labels)
    same = logits(data, bias).argmax(axis=1) == nearest
    return np.array([same[data.labels == k].mean() for k in np.unique(data.labels)])


def ncc_mismatch(data, bias=True):
    nearest = nearest_centres(data.features, data.labels)
    return np.mean(logits(data, bias).argmax(axis=1) != nearest)


def accuracy(data):
    return np.mean(logits(data).argmax(axis=1) == data.labels)


def ood_cosine(data):
    centre = class_means(data.ood_features, data.ood_labels).mean(axis=0)
    means = class_means(data.features, data.labels)
    return np.mean(
        [abs(m @ centre) / np.linalg.norm(m) / np.linalg.norm(centre) for m in means]
    )


# Losses and margins


def cross_entropy(data):
    pairs = zip(logits(data), data.labels, strict=True)
    return np.mean([z.max() + np.log(np.sum(np.exp(z - z.max()))) - z[y] for z, y in pairs])


def squared_error(data):
    pairs = zip(logits(data), data.labels, strict=True)
    return np.mean([np.sum((z - np.eye(len(z))[y]) ** 2) for z, y in pairs])


def own_minus_best_other(scores, labels):
    pairs = zip(scores, labels, strict=True)
    return np.array([z[y] - np.max(np.delete(z, y)) for z, y in pairs])


def cosine_margins(data, centred_product=True):
    centre = data.features.mean(axis=0)
    W = centred_rows(data.W)
    scores = []
    for h in data.features:
        product = W @ (h - centre) if centred_product else data.W @ h
        scores.append(product / np.linalg.norm(h - centre) / np.linalg.norm(W, axis=1))
    return own_minus_best_other(scores, data.labels)


def squared_error_parts(data, weight_decay=5e-4):
    decay, rows = weight_decay / 2, class_means(data.features, data.labels)
    size, dim = rows.shape
    W = data.W
    if data.b is not None:
        rows, W = np.hstack([rows, np.ones((size, 1))]), np.hstack([W, data.b[:, None]])
    within = np.zeros((rows.shape[1], rows.shape[1]))
    within[:dim, :dim] = within_covariance(data.features, data.labels)
    within += decay * np.eye(len(within))
    system = within + rows.T @ rows / size
    least = (np.linalg.pinv(system, rcond=1e-12) @ rows.T / size).T
    gap = W - least
    return (
        np.trace(least @ within @ least.T) / 2,
        np.sum((rows @ least.T - np.eye(size)) ** 2) / (2 * size),
        np.trace(gap @ system @ gap.T) / 2,
    )


def hull_distance(point, corners):
    """Distance to a convex hull: the nearest projection on a face that lies within it."""
    best = np.inf
    for size in range(1, len(corners) + 1):
        for chosen in combinations(range(len(corners)), size):
            face = corners[list(chosen)]
            edges = (face[1:] - face[0]).T
            inner = np.linalg.lstsq(edges, point - face[0], rcond=None)[0]
            weights = np.concatenate([[1 - inner.sum()], inner])
            if np.all(weights >= 0):
                best = min(best, np.linalg.norm(point - weights @ face))
    return best


def one_vs_rest_distances(W):
    unit = unit_rows(W)
    return np.array(
        [hull_distance(unit[k], np.delete(unit, k, axis=0)) for k in range(len(unit))]
    )


# Name in tests/data/collapse_values.json, without "formula." -> f(Data)


def _rows_of_data():
    return {
        "M.class_mean": lambda data: centred_means(*data[:2]),
        "M.sample_mean": lambda data: centred_means(*data[:2], "sample_mean"),
        "W": lambda data: data.W,
        "W.centred": lambda data: centred_rows(data.W),
    }


def _variability():
    def of(function, **options):
        return lambda data: function(*data[:2], **options)

    table = {
        "nc1.pinv_over_K.class_mean.Sw_class_balanced": of(
            within_class_variation, weighting="class"
        ),
        "nc1.cdnv": of(cdnv),
        "nc1.cdnv_exp2": of(cdnv, power=2),
        "nc1.vci.sample_mean": of(variability_collapse_index),
        "nc1.nuclear_over_fro": of(nuclear_over_frobenius),
        "nc1.numerical_rank": of(nuclear_over_frobenius, power=2),
        "lpm.avg_sq_feature_norm": of(average_squared_norm),
    }
    for centring in ("class_mean", "sample_mean"):
        whitened = partial(of, within_class_variation, centring=centring)
        table |= {
            f"nc1.pinv_over_K.{centring}": whitened(),
            f"nc1.pinv_trace.{centring}": whitened(per_class=False),
            f"nc1.quotient.{centring}": of(within_class_quotient, centring=centring),
        }
    return table


def _frames():
    functions = {
        "norm_cv_ddof1": norm_variation,
        "norm_cv_ddof0": lambda rows: norm_variation(rows, ddof=0),
        "cos_absdev": cosine_deviation,
        "cos_mean": lambda rows: np.mean(pair_cosines(rows)),
        "cos_std_ddof0": lambda rows: np.std(pair_cosines(rows)),
        "max_cos": lambda rows: np.max(pair_cosines(rows)),
        "etf_gram_error": etf_gram_error,
    }
    table = {}
    for name, function in functions.items():
        for which, rows in _rows_of_data().items():
            table[f"nc2.{name}.{which}"] = lambda data, f=function, rows=rows: f(rows(data))
    for name, kernel in {"dist": "distance", "log": "log", "riesz": "riesz"}.items():
        for suffix, moment in {"mean": np.mean, "var_ddof0": np.var}.items():
            table[f"nc2g.{name}.{suffix}"] = lambda data, moment=moment, kernel=kernel: (
                moment(uniformity_kernel(centred_means(*data[:2]), kernel))
            )
    return table


def _duality():
    functions = {
        "fro_dist": self_duality,
        "fro_dist_sq": lambda rows, others: self_duality(rows, others, squared=True),
        "product_etf_error": product_etf_error,
        "cos_mean": lambda rows, others: np.mean(row_cosines(rows, others)),
        "one_minus_cos": lambda rows, others: 1 - np.mean(row_cosines(rows, others)),
        "dot_var_ddof1": lambda rows, others: np.var(row_dots(rows, others), ddof=1),
    }
    rows = _rows_of_data()
    table = {}
    for name, function in functions.items():
        for short, which in {"W": "W", "Wc": "W.centred"}.items():
            for centring in ("class_mean", "sample_mean"):
                pair = (rows[which], rows[f"M.{centring}"])
                table[f"nc3.{name}.{short}.{centring}"] = (
                    lambda data, f=function, pair=pair: f(*(rows(data) for rows in pair))
                )
    return table


def _others():
    def normalised(data):
        return unit_rows(data.features), data.labels

    table = {
        "nc3.Wmu_plus_b": lambda data: np.linalg.norm(
            data.W @ data.features.mean(axis=0) + data.b
        ),
        "nc4.ncc_mismatch": ncc_mismatch,
        "nc4.ncc_mismatch_nobias": lambda data: ncc_mismatch(data, bias=False),
        "nc4.ncc_accuracy": lambda data: np.mean(nearest_centres(*data[:2]) == data.labels),
        "accuracy": accuracy,
        "loss.ce": cross_entropy,
        "loss.mse_sum_over_classes": squared_error,
        "nc5.ood_abs_cos": ood_cosine,
        "margin.cos_centred_mean": lambda data: np.mean(cosine_margins(data)),
        "margin.zhou_mean": lambda data: np.mean(cosine_margins(data, False)),
        "margin.logit_min": lambda data: np.min(
            own_minus_best_other(logits(data), data.labels)
        ),
        "gnc1.pinv_over_K.normalised": lambda data: within_class_variation(
            *normalised(data), "sample_mean"
        ),
        "gnc2.min_one_vs_rest_distance": lambda data: np.min(one_vs_rest_distances(data.W)),
        "gnc3.one_minus_cos": lambda data: np.mean(
            1 - row_cosines(data.W, centred_means(*normalised(data), "sample_mean"))
        ),
    }
    for part, name in enumerate(("LNC1", "LNC23", "Lperp")):
        table[f"mse.{name}"] = lambda data, part=part: squared_error_parts(data)[part]
    return table


FORMULAS = _variability() | _frames() | _duality() | _others()

# Field of ncjax.CollapseMetrics -> name above
FIELDS = {
    "within_class_variation": "nc1.pinv_over_K.class_mean",
    "within_class_quotient": "nc1.quotient.class_mean",
    "cdnv": "nc1.cdnv",
    "mean_norm_variation": "nc2.norm_cv_ddof1.M.class_mean",
    "classifier_norm_variation": "nc2.norm_cv_ddof1.W",
    "centred_classifier_norm_variation": "nc2.norm_cv_ddof1.W.centred",
    "mean_cosine_deviation": "nc2.cos_absdev.M.class_mean",
    "classifier_cosine_deviation": "nc2.cos_absdev.W",
    "centred_classifier_cosine_deviation": "nc2.cos_absdev.W.centred",
    "etf_gram_error": "nc2.etf_gram_error.M.class_mean",
    "self_duality": "nc3.fro_dist.W.class_mean",
    "centred_self_duality": "nc3.fro_dist.Wc.class_mean",
    "product_etf_error": "nc3.product_etf_error.W.class_mean",
    "ncc_mismatch": "nc4.ncc_mismatch",
    "accuracy": "accuracy",
}


def without(data, kept):
    """The problem of the classes `kept` alone, numbered anew."""
    chosen = np.isin(data.labels, kept)
    labels = np.searchsorted(kept, data.labels[chosen])
    return Data(data.features[chosen], labels, data.W[kept], data.b[kept])


def metrics_of_present(data, min_count):
    """The fields of the classes with `min_count` samples; the classifier knows all K."""
    counts = np.bincount(data.labels, minlength=len(data.W))
    kept = np.flatnonzero(counts >= min_count)
    few = without(data, kept)
    values = {
        field: FORMULAS[name](few)
        for field, name in FIELDS.items()
        if field not in ("ncc_mismatch", "accuracy")
    }
    decided = logits(data).argmax(axis=1)[np.isin(data.labels, kept)]
    nearest = kept[nearest_centres(few.features, few.labels)]
    values["ncc_mismatch"] = np.mean(decided != nearest)
    values["accuracy"] = np.mean(decided == kept[few.labels])
    return values


# --------------------------------------------------------------------------
# layer-peeled model: W (K, d), H (K, n, d)
# --------------------------------------------------------------------------


def margins(W, H):
    """m_kij = (w_k - w_j)·h_ki, (K, n, K), +inf where j = k."""
    K, n, _ = H.shape
    m = np.full((K, n, K), np.inf, dtype=H.dtype)
    for k in range(K):
        for i in range(n):
            for j in range(K):
                if j != k:
                    m[k, i, j] = (W[k] - W[j]) @ H[k, i]
    return m


def ulpm_cross_entropy(W, H):
    """Sum over samples of log(1 + sum_{j != k} exp(-m_kij))."""
    return np.sum(np.log1p(np.sum(np.exp(-margins(W, H)), axis=-1)))


def log_softplus(a):
    """log log(1 + e^a) and its derivative in a, in extended precision."""
    a = np.asarray(a, np.longdouble)
    softplus = np.where(a > 0, a, 0) + np.log1p(np.exp(-np.abs(a)))
    small = a < -60  # the rest of the series is below e^-120
    series = a - np.exp(np.minimum(a, 0)) / 2
    value = np.where(small, series, np.log(np.where(small, 1, softplus)))
    log_sigmoid = np.where(a < 0, a, 0) - np.log1p(np.exp(-np.abs(a)))
    return value, np.exp(log_sigmoid - value)


def log_cross_entropy_and_gradient(W, H, weights=None, gamma=0):
    """log L and its gradient (in W, in H), by loops in extended precision.

    With gamma it is the focal loss. Samples of weight 0 do not enter.
    """
    W, H = (np.asarray(leaf, np.longdouble) for leaf in (W, H))
    K, n, _ = H.shape
    m = margins(W, H)
    least = m.min(axis=-1)
    exponentials = np.exp(least[..., None] - m)  # 0 where j = k
    a = np.log(exponentials.sum(axis=-1)) - least
    log_loss, slope = log_softplus(a)
    log_sigmoid = np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))
    log_loss, slope = (
        log_loss + gamma * log_sigmoid,
        slope + gamma * (1 - np.exp(log_sigmoid)),
    )
    weights = np.ones((K, n)) if weights is None else np.asarray(weights, np.longdouble)
    log_loss = np.where(
        weights > 0, log_loss + np.log(np.where(weights > 0, weights, 1)), -np.inf
    )
    total = log_loss.max() + np.log(np.sum(np.exp(log_loss - log_loss.max())))
    gradient_W, gradient_H = np.zeros_like(W), np.zeros_like(H)
    for k in range(K):
        for i in range(n):
            share = np.exp(log_loss[k, i] - total) * slope[k, i]
            each = share * exponentials[k, i] / exponentials[k, i].sum()
            for j in range(K):
                if j != k:  # d(-m_kij) = (w_j - w_k)·dh + (dw_j - dw_k)·h
                    gradient_H[k, i] += each[j] * (W[j] - W[k])
                    gradient_W[j] += each[j] * H[k, i]
                    gradient_W[k] -= each[j] * H[k, i]
    return total, gradient_W, gradient_H


def tangent_and_slack(params, multipliers):
    """`tangent_and_slack_of_samples` of all samples."""
    W, H = (np.asarray(leaf) for leaf in params)
    K, n, d = H.shape
    labels = np.arange(K).repeat(n)
    return tangent_and_slack_of_samples(
        W, H.reshape(-1, d), labels, multipliers.reshape(-1, K)
    )


def tangent_and_slack_of_samples(W, features, labels, multipliers):
    """|Z̃ - Σ λ ∇m| / |Z̃| and Σ λ (m̃ - 1) / Σ λ m̃, by loops from the definitions."""
    pairs = [(a, k, j) for a, k in enumerate(labels) for j in range(len(W)) if j != k]
    root = np.sqrt(min((W[k] - W[j]) @ features[a] for a, k, j in pairs))
    W, H = W / root, features / root
    rest_W, rest_H, slack, total = W.copy(), H.copy(), 0.0, 0.0
    for a, k, j in pairs:
        weight = multipliers[a, j]
        rest_W[k] -= weight * H[a]
        rest_W[j] += weight * H[a]
        rest_H[a] -= weight * (W[k] - W[j])
        margin = (W[k] - W[j]) @ H[a]
        slack += weight * (margin - 1)
        total += weight * margin
    rest = np.sum(rest_W**2) + np.sum(rest_H**2)
    return np.sqrt(rest / (np.sum(W**2) + np.sum(H**2))), slack / total


def last_layer(features, labels, W):
    """Fields of ncjax.LastLayer by loops in extended precision.

    Its range of 1e±4932 holds the squares of all numbers of float32 and float64.
    """
    H, W = (np.asarray(leaf, np.longdouble) for leaf in (features, W))
    K, optimum = len(W), (len(W) - 1) * np.sqrt(np.bincount(labels).min())
    least, log_losses, slopes = [], [], []
    for h, y in zip(H, labels, strict=True):
        margins = {j: (W[y] - W[j]) @ h for j in range(K) if j != y}
        least.append(min(margins.values()))
        exponentials = {j: np.exp(least[-1] - m) for j, m in margins.items()}
        total = sum(exponentials.values())
        log_loss, slope = log_softplus(np.log(total) - least[-1])
        log_losses.append(log_loss)
        slopes.append({j: slope * e / total for j, e in exponentials.items()})
    highest = max(log_losses)
    log_loss = highest + np.log(sum(np.exp(each - highest) for each in log_losses))
    gradient_W, gradient_H = np.zeros_like(W), np.zeros_like(H)
    for a, y in enumerate(labels):
        for j, slope in slopes[a].items():
            weight = np.exp(log_losses[a] - log_loss) * slope
            gradient_H[a] += weight * (W[j] - W[y])
            gradient_W[j] += weight * H[a]
            gradient_W[y] -= weight * H[a]
    norm_W, norm_H = (np.sqrt(np.sum(leaf**2)) for leaf in (W, H))

    def angle(c):
        z = np.concatenate([(c * W).ravel(), (H / c).ravel()])
        g = np.concatenate([(gradient_W / c).ravel(), (c * gradient_H).ravel()])
        z, g = z / np.sqrt(z @ z), g / np.sqrt(g @ g)
        rest = z - (z @ g) * g
        return np.sqrt(rest @ rest)

    return {
        "loss": np.exp(log_loss) / len(H),
        "log_loss": log_loss,
        "least_margin": min(least),
        "margin_ratio": 2 * optimum * min(least) / (norm_W**2 + norm_H**2),
        "balanced_margin_ratio": optimum * min(least) / (norm_W * norm_H),
        "kkt_angle": angle(np.longdouble(1)),
        "balanced_kkt_angle": angle(np.sqrt(norm_H / norm_W)),
    }
