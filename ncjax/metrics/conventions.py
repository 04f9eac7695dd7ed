"""Give each paper's own numbers under its own names.

`measure("papyan2020", features, labels, W, b)` returns the numbers that the code of Papyan,
Han, Donoho (2020) prints, under the names that it prints. `CONVENTIONS` is the registry:
each convention is one function from the data to its numbers, with the paper as source. The
page "Conventions of other codebases" gives the formula of each number.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax import sizes
from ncjax.arrays import as_array
from ncjax.checks import check_choice, check_finite, check_nonnegative
from ncjax.metrics import measures, statistics, variants
from ncjax.metrics.collapse import (
    class_distance_normalised_variance,
    collapse_metrics_from_features,
    within_class_quotient,
)
from ncjax.metrics.inputs import check_features
from ncjax.metrics.statistics import ClassStatistics, Comparison
from ncjax.metrics.tiles import FEW_CLASSES
from ncjax.numerics import at_unit_scale, matmul, power_of_two
from ncjax.peeled.losses import softmax_cross_entropy
from ncjax.types import Array

# Bytes on CPU of one chunk of features with its logits, in float32.
_CHUNK_BYTES = 2**25

Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Data:
    """Checked features, labels and classifier, with the passes that numbers share."""

    features: Array  # (N, d)
    labels: Array  # (N,)
    W: Array  # (K, d)
    b: Array | None  # (K,)

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array | None]:
        return self.features, self.labels, self.W, self.b

    def chunks(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Yield the samples in chunks that take a few MB with `columns` numbers each."""
        numbers = sizes.chunk_bytes(sizes.platform_of(self.features), _CHUNK_BYTES) // 4
        size = max(1, numbers // (self.W.shape[1] + columns))
        if len(self.labels) <= size:
            yield self.features, self.labels
            return
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            yield self.features[part], self.labels[part]

    def chunks_of_passes(self) -> Iterator[tuple[Array, Array]]:
        """Yield chunks for `ncjax.statistics`, which reads many classes in tiles."""
        return self.chunks(min(len(self.W), FEW_CLASSES))

    @cached_property
    def first(self) -> ClassStatistics:
        """Counts, means and scatters of the classes."""
        num_classes, dim = self.W.shape
        seen = _no_samples(num_classes, dim, self.W.dtype)
        for features, labels in self.chunks_of_passes():
            seen = _update(seen, features, labels)
        return seen

    @property
    def last_layer(self) -> tuple[ClassStatistics, Array, Array | None]:
        return self.first, self.W, self.b

    def second(self, centring: str, bias: bool = True) -> Comparison:
        """Return the comparison with class means and classifier, on the host."""
        b = self.b if bias else None
        seen, *given = _prepared(self.features, self.first, self.W, b, centring)
        for features, labels in self.chunks_of_passes():
            seen = _compare(seen, *given, features, labels)
        return jax.device_get(seen)

    def mean(self, of_samples: Callable[..., Array]) -> float:
        """Return the mean over all samples of a function that is a mean over samples."""
        parts = [
            (float(of_samples(*chunk, self.W, self.b)), len(chunk[1]))
            for chunk in self.chunks(len(self.W))
        ]
        return sum(value * size for value, size in parts) / len(self.labels)

    def decay(self, rate: float) -> float:
        """Return the weight decay of the last layer."""
        squares = [np.sum(np.asarray(x) ** 2) for x in (self.W, self.b) if x is not None]
        return rate / 2 * float(sum(squares))


# One program each instead of one for every operation.
_no_samples = jax.jit(statistics.init, static_argnums=(0, 1, 2))
_update = jax.jit(statistics.update)
_parts = jax.jit(variants.squared_error_parts, static_argnames="weight_decay")
_margins = jax.jit(variants.cosine_margins, static_argnames="centred_product")
_collapse_index = jax.jit(variants.variability_collapse_index, static_argnums=2)
_unit_rows = jax.jit(measures.unit_rows)


# The losses of a chunk, which may have fewer samples than there are classes.


@jax.jit
def _cross_entropy(features: Array, labels: Array, W: Array, b: Array | None) -> Array:
    return jnp.mean(softmax_cross_entropy(_logits(features, W, b), labels))


@jax.jit
def _squared_error(features: Array, labels: Array, W: Array, b: Array | None) -> Array:
    targets = jax.nn.one_hot(labels, W.shape[0], dtype=W.dtype)
    return jnp.mean(jnp.sum((_logits(features, W, b) - targets) ** 2, axis=1))


def _logits(features: Array, W: Array, b: Array | None) -> Array:
    product = matmul(features.astype(W.dtype), W.T)
    return product if b is None else product + b[None]


@partial(jax.jit, static_argnums=4)
def _prepared(features: Array, first: ClassStatistics, W, b, centring: str):
    """Return an empty comparison and what `_compare` needs beside it, at unit scale."""
    # The comparison does not depend on the scale of features and b, or of W and b.
    scale = power_of_two(features).astype(W.dtype)
    W, b = at_unit_scale((W, None if b is None else b / scale))
    first = first._replace(anchor=first.anchor / scale, offset=first.offset / scale)
    against = statistics.reference(first, centring)
    return statistics.init_comparison(len(W), W.dtype), scale, first, against, W, b


@jax.jit
def _compare(seen: Comparison, scale, first, against, W, b, features, labels) -> Comparison:
    features = features.astype(W.dtype) / scale
    return statistics.compare(seen, first, against, features, labels, W, b)


def _variation(second: Comparison) -> float:
    """Return the trace over K of the within-class variation."""
    return float(np.sum(second.whitened_scatter) / np.sum(second.counts, dtype=np.int64))


def _mismatch(second: Comparison) -> float:
    """Return the share of samples on which classifier and nearest centre disagree."""
    mismatches, counts = (
        np.sum(x, dtype=np.int64) for x in (second.mismatches, second.counts)
    )
    return float(mismatches / counts)


def _average(values: Array | np.ndarray) -> float:
    """Return the mean of values, computed on the host."""
    return float(np.mean(np.asarray(values, np.float64)))


# Conventions


def _ji2022(data: _Data) -> Numbers:
    metrics = collapse_metrics_from_features(*data.arrays)
    fields = (
        *("mean_norm_variation", "centred_classifier_norm_variation"),
        *("classifier_norm_variation", "within_class_variation", "mean_cosine_deviation"),
        *("centred_classifier_cosine_deviation", "classifier_cosine_deviation"),
        *("centred_self_duality", "self_duality"),
    )
    return {field: getattr(metrics, field) for field in fields}


def _papyan2020(data: _Data, weight_decay: float = 5e-4) -> Numbers:
    check_nonnegative("weight_decay", weight_decay)
    metrics = collapse_metrics_from_features(*data.arrays)
    loss = data.mean(_cross_entropy)
    return {
        "accuracy": metrics.accuracy,
        "loss": loss,
        "reg_loss": loss + data.decay(weight_decay),
        "Sw_invSb": len(data.W) * float(metrics.within_class_variation),
        "norm_M_CoV": metrics.mean_norm_variation,
        "norm_W_CoV": metrics.classifier_norm_variation,
        "cos_M": metrics.mean_cosine_deviation,
        "cos_W": metrics.classifier_cosine_deviation,
        "W_M_dist": float(metrics.self_duality) ** 2,
        "NCC_mismatch": metrics.ncc_mismatch,
    }


def _han2022(data: _Data, weight_decay: float = 5e-4) -> Numbers:
    parts = _parts(*data.arrays, weight_decay=weight_decay)
    loss = data.mean(_squared_error)
    return {
        "LNC1": parts.nc1,
        "LNC23": parts.nc23,
        "Lperp": parts.perpendicular,
        "loss": loss,
        "MSE_wd_features": (loss + data.decay(weight_decay)) / 2,
    }


@partial(jax.jit, static_argnames="centred_classifier")
def _zhu_rows(first, W, b, centred_classifier: bool = False) -> Numbers:
    means = statistics.centred_means(first, "sample_mean")
    rows = measures.centre_rows(W) if centred_classifier else W
    return {
        "ETF_metric": measures.etf_gram_error(rows),
        "WH_relation": measures.product_etf_error(rows, means),
        "Wh_b": variants.mean_logits_norm(first, W, b),
    }


def _zhu2021(data: _Data) -> Numbers:
    return {
        "collapse_metric": _variation(data.second("sample_mean")),
        **_zhu_rows(*data.last_layer),
    }


def _zhou2022(data: _Data) -> Numbers:
    samples = data.features, data.labels
    margins = _margins(*samples, data.W, centred_product=False)
    return {
        "collapse_metric": _variation(data.second("sample_mean")),
        **_zhu_rows(*data.last_layer, centred_classifier=True),
        "nuclear_metric": _average(variants.nuclear_over_frobenius(*samples, len(data.W))),
        "avg_cos_margin": _average(margins),
    }


@jax.jit
def _guiding_rows(first, W) -> Numbers:
    means = statistics.centred_means(first, "sample_mean")
    return {
        "W_equinorm": measures.norm_variation(W),
        "H_equinorm": measures.norm_variation(means),
    }


def _guiding(data: _Data) -> Numbers:
    samples, size = (data.features, data.labels), len(data.W)
    second = data.second("sample_mean")
    quotients = np.asarray(variants.nuclear_over_frobenius(*samples, size))
    return {
        "collapse_metric": _variation(second),
        "VCI": _collapse_index(*samples, size),
        **_zhu_rows(*data.last_layer),
        **_guiding_rows(data.first, data.W),
        "numerical_rank": _average(quotients**2),
        "avg_cos_margin": _average(_margins(*samples, data.W)),
        "NCC_mismatch_percent": 100 * _mismatch(second),
    }


@jax.jit
def _rhubarb_rows(first: ClassStatistics, W: Array) -> Numbers:
    M = statistics.centred_means(first)
    dots = measures.row_dots(W, M)
    unit = measures.row_distances(measures.unit_rows(W), measures.unit_rows(M))
    # |M Mᵀ| = |Mᵀ M|.
    gram = matmul(M.T, M) if M.shape[1] < len(M) else matmul(M, M.T)
    numbers = {
        "nc1_quot": within_class_quotient(first),
        "nc1_cdnv": class_distance_normalised_variance(first),
        "nc1_cdnv_exp2": class_distance_normalised_variance(first, power=2),
        "mean_norms_cv": measures.norm_variation(M),
        "mean_norms_avg": jnp.mean(jnp.linalg.norm(M, axis=1)),
        "interference_fro": jnp.linalg.norm(gram),
        "nc2_etf_err": measures.etf_gram_error(M),
        "nc2_etf_err_W": measures.etf_gram_error(W),
        "nc3_dual_err": measures.product_etf_error(W, M),
        "nc3u_sim_mean": jnp.mean(dots),
        "nc3u_sim_var": jnp.var(dots, ddof=1),
        "nc3_cos_mean": jnp.mean(measures.row_cosines(W, M)),
        "nc3_dist_norms_mean": jnp.mean(unit),
        "nc3_dist_norms_raw_mean": jnp.mean(measures.row_distances(W, M)),
    }
    for short, kernel in {"dist": "distance", "log": "log", "riesz": "riesz"}.items():
        moments = variants.uniformity_moments(M, kernel)
        numbers[f"nc2g_{short}_mean"] = moments.mean
        numbers[f"nc2g_{short}_var"] = moments.variance
    return numbers


def _rhubarb(data: _Data, ood_mean: Array | None = None) -> Numbers:
    second = data.second("class_mean", bias=False)
    variation = _variation(second)
    numbers = {
        "nc1_pinv": variation,
        "nc1_svd": variation,
        **_rhubarb_rows(data.first, data.W),
        "nc4_agree": 1 - _mismatch(second),
        "nc4_agree_unweighted": _average(1 - second.mismatches / second.counts),
    }
    if ood_mean is not None:
        means = statistics.class_means(data.first)
        ood_mean = as_array("ood_mean", ood_mean).astype(means.dtype)
        check_finite("ood_mean", ood_mean)
        numbers["nc5_ood_dev"] = _average(variants.ood_cosines(means, ood_mean))
    return numbers


@jax.jit
def _duality_cosine(first: ClassStatistics, W: Array) -> Array:
    means = statistics.centred_means(first, "sample_mean")
    return jnp.mean(measures.row_cosines(W, means))


def _jiang2024(data: _Data) -> Numbers:
    unit = dataclasses.replace(data, features=_unit_rows(data.features))
    return {
        "GNC1": _variation(unit.second("sample_mean")),
        "GNC2": variants.one_vs_rest_distances(data.W).min(),
        "GNC3": 1 - float(_duality_cosine(unit.first, data.W)),
    }


@jax.jit
def _fang_rows(first: ClassStatistics, W: Array) -> Numbers:
    M = statistics.centred_means(first, "sample_mean")
    distance = measures.self_duality(W, M)
    return {
        "avg_sq_feature_norm": variants.average_squared_norm(first),
        "norm_cv_W": measures.norm_variation(W, ddof=0),
        "norm_cv_M": measures.norm_variation(M, ddof=0),
        "cos_absdev_W": measures.cosine_deviation(W),
        "cos_absdev_M": measures.cosine_deviation(M),
        "dual": distance,
        "dual_sq": distance**2,
    }


def _fang2021(data: _Data) -> Numbers:
    return _fang_rows(data.first, data.W)


class Convention(NamedTuple):
    """A convention: its source, and the function from the data to its numbers."""

    source: str
    summary: str  # what its numbers have in common
    numbers: Callable[..., Numbers]
    options: tuple[str, ...] = ()  # keywords of `measure` that `numbers` takes


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "ji2022": Convention(
            "Ji, Lu, Zhang, Deng, Su (ICLR 2022), Figures 1 and 2",
            "About the mean of the class means; raw and centred classifier; "
            "names of CollapseMetrics.",
            _ji2022,
        ),
        "papyan2020": Convention(
            "Papyan, Han, Donoho (PNAS 2020), notebook",
            "About the mean of the class means; raw classifier; bias in NC4.",
            _papyan2020,
            ("weight_decay",),
        ),
        "han2022": Convention(
            "Han, Papyan, Donoho (ICLR 2022), notebook for the squared error",
            "The squared error with weight decay of the last layer, and its parts.",
            _han2022,
            ("weight_decay",),
        ),
        "zhu2021": Convention(
            "Zhu et al. (NeurIPS 2021), code",
            "About the mean of all samples; raw classifier.",
            _zhu2021,
        ),
        "zhou2022": Convention(
            "Zhou et al. (NeurIPS 2022), code",
            "About the mean of all samples; centred classifier.",
            _zhou2022,
        ),
        "rhubarb": Convention(
            "Wu, Papyan (NeurIPS 2024), package neural_collapse",
            "About the mean of the class means; raw classifier without its bias.",
            _rhubarb,
            ("ood_mean",),
        ),
        "guiding": Convention(
            'Markou, Ajanthan, Gould (NeurIPS 2024), code of "Guiding neural collapse"',
            "About the mean of all samples; raw classifier.",
            _guiding,
        ),
        "jiang2024": Convention(
            "Jiang et al. (ICML 2024), generalised neural collapse for many classes",
            "Features of norm 1, about the mean of all samples; raw classifier.",
            _jiang2024,
        ),
        "fang2021": Convention(
            "Fang, He, Long, Su (PNAS 2021)",
            "About the mean of all samples; raw classifier; variances divide by K.",
            _fang2021,
        ),
    }
)
NAMES = tuple(CONVENTIONS)


def measure(
    convention: str,
    features,
    labels,
    W,
    b=None,
    *,
    min_count: int | None = None,
    weight_decay: float | None = None,
    ood_mean=None,
) -> dict[str, float]:
    """Return the numbers of one convention, under the names of its codebase.

    Numbers of one convention share two passes over the features, which are read in chunks.
    `nuclear_metric`, `numerical_rank`, `VCI`, `avg_cos_margin` and the parts of the squared
    error read them in one piece. `GNC2` solves a small system for each class.

    Args:
      convention: one of `NAMES`; `CONVENTIONS[convention].source` is its paper.
      features: (N, d) floating, the input of the last layer: JAX, NumPy or PyTorch.
      labels: (N,) integers in [0, K).
      W: (K, d) weight of the last layer.
      b: (K,) bias; None for a layer without bias.
      min_count: None requires a sample of every class. A number m leaves out the classes
        with fewer than m samples, with their samples and their rows of W and b, as if the
        problem had only the others.
      weight_decay: of the last layer in the losses of "papyan2020" and "han2022"; None is
        5e-4, as in their notebooks.
      ood_mean: (d,) mean of out-of-distribution features, for `nc5_ood_dev` of "rhubarb";
        None leaves that number out.

    Returns:
      Numbers by name. A number that is undefined is NaN.

    Raises:
      ValueError: the convention is unknown, an option belongs to another convention, or as
        in `ncjax.collapse_metrics_from_features`.

    >>> import numpy as np
    >>> from ncjax import conventions
    >>> labels = np.arange(60) % 3
    >>> features = np.eye(3)[labels] + 0.1 * np.cos(np.arange(180.0)).reshape(60, 3)
    >>> sorted(conventions.measure("zhu2021", features, labels, np.eye(3)))
    ['ETF_metric', 'WH_relation', 'Wh_b', 'collapse_metric']
    """
    check_choice("convention", convention, NAMES)
    chosen = CONVENTIONS[convention]
    options = {"weight_decay": weight_decay, "ood_mean": ood_mean}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in chosen.options:
            owners = [key for key, one in CONVENTIONS.items() if name in one.options]
            raise ValueError(
                f"{name} belongs to {' and '.join(owners)}, got convention {convention!r}: "
                "leave it out"
            )
    data = _Data(*check_features(features, labels, W, b, min_count=min_count))
    if min_count is not None:
        data = _with_samples(data, min_count)
    return {name: float(x) for name, x in chosen.numbers(data, **options).items()}


def _with_samples(data: _Data, min_count: int) -> _Data:
    """Return the problem without the classes of fewer than `min_count` samples."""
    labels = np.asarray(data.labels)
    kept = np.bincount(labels, minlength=len(data.W)) >= min_count
    samples, classes = np.flatnonzero(kept[labels]), np.flatnonzero(kept)
    number = (np.cumsum(kept) - 1).astype(labels.dtype)
    return _Data(
        features=data.features[samples],
        labels=jnp.asarray(number[labels[samples]]),
        W=data.W[classes],
        b=None if data.b is None else data.b[classes],
    )
