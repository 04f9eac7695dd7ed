r"""Measure neural collapse in every layer of a network.

`layerwise` takes the features of all layers. `layer_metrics` takes one layer, so that a
caller need not hold all of them at once; `over_depth` then joins the layers. No layer
needs a classifier, and no (d, d) matrix is formed, so a layer may be a flattened
convolution with d = 65 536.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.arrays import as_array, read_array
from ncjax.checks import check_choice, concrete
from ncjax.metrics import measures, statistics
from ncjax.metrics.collapse import (
    class_distance_normalised_variance,
    within_class_quotient,
)
from ncjax.metrics.depth import (
    RANK_THRESHOLD,
    TUNNEL_SHARE,
    SeparationLaw,
    Tunnel,
    feature_rank,
    find_tunnel,
    separation_law,
)
from ncjax.metrics.inputs import check_centres, check_classifier, check_samples
from ncjax.metrics.whitening import whiten
from ncjax.numerics import at_unit_scale, matmul, on_device, power_of_two, widen
from ncjax.types import Array

POOLINGS = ("flatten", "channels_last", "channels_first")


class LayerMetrics(NamedTuple):
    r"""Collapse of the features of one layer, scalars; or of L layers, arrays (L,).

    Notation as in `ncjax.CollapseMetrics`. $\mathrm{SS}_b = \sum_k \tfrac{n_k}{N}
    (\bar h_k - \bar h)(\bar h_k - \bar h)^\top$ weighs each class by its $n_k$ samples, and
    $\bar h$ is the mean of all samples.
    """

    dim: Array  # d, after pooling (int32)
    within_class_variation: Array  # NC1  Tr(Σ_W Σ_B⁺) / K
    within_class_quotient: Array  # NC1  Tr Σ_W / Tr Σ_B
    cdnv: Array  # NC1  mean over pairs of (v_j + v_k) / (2 |h̄_j - h̄_k|²)
    fuzziness: Array  # NC1  separation fuzziness D = Tr(Σ_W SS_b⁺)
    mean_norm_variation: Array  # NC2  std/mean of |h̄_k - h_G|, ddof 1
    mean_cosine_deviation: Array  # NC2  mean over pairs |cos + 1/(K-1)| of h̄_k - h_G
    ncc_accuracy: Array  # share of samples nearest to the centre of their own class
    accuracy: Array  # share that the classifier gets right, NaN without a classifier
    ncc_mismatch: Array  # NC4  share where classifier and nearest centre disagree, or NaN
    numerical_rank: Array  # covariance eigenvalues above 1e-3 of the largest (int32)
    stable_rank: Array  # Σ s_i² / s_1², s_i the singular values of the centred features
    effective_rank: Array  # exp of the entropy of s_i / Σ s_j


class Layerwise(NamedTuple):
    """Collapse over the depth of a network of L layers."""

    names: tuple[str, ...]  # of the layers, from the input on
    metrics: LayerMetrics  # arrays (L,)
    law: SeparationLaw  # of data separation, fitted to log `fuzziness`
    tunnel: Tunnel  # by NCC accuracy and numerical rank
    class_means: dict[str, Array]  # (K, d) of each layer; pass them as `centres`

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer: its name and metrics as numbers, for a table."""
        columns = jax.tree.map(np.asarray, self.metrics)._asdict()
        return [
            {"layer": name} | {field: column[i].item() for field, column in columns.items()}
            for i, name in enumerate(self.names)
        ]

    def as_dict(self) -> dict[str, float]:
        """Return all numbers in one flat dict, `LAYER/METRIC`, for a tracker."""
        flat = {
            f"{row['layer']}/{field}": float(value)
            for row in self.rows()
            for field, value in row.items()
            if field != "layer"
        }
        for part, fields in (("law", self.law), ("tunnel", self.tunnel)):
            flat |= {f"{part}/{k}": float(v) for k, v in fields._asdict().items()}
        return flat


def layerwise(
    features_by_layer: Mapping[str, Array],
    labels: Array,
    *,
    num_classes: int | None = None,
    classifiers: Mapping[str, Any] | None = None,
    centres: Mapping[str, Array] | None = None,
    min_count: int | None = None,
    pooling: str = "flatten",
    rank_threshold: float = RANK_THRESHOLD,
    tunnel_share: float = TUNNEL_SHARE,
) -> Layerwise:
    r"""Measure every layer of a network, and how the layers change with depth.

    Args:
      features_by_layer: features by the name of the layer, from the input to the last
        layer: (N, d_l), or (N, ...) with positions, see `pooling`. Floating.
      labels: (N,) integers in [0, K).
      num_classes: K; None takes the largest label plus 1, or the rows of `centres`.
      classifiers: W (K, d_l), or a pair (W, b) with b (K,), by the name of the layer; for
        example linear probes, and the network's own last layer. Layers without one have
        `accuracy` and `ncc_mismatch` NaN.
      centres: (K, d_l) class centres by layer for `ncc_accuracy` and `ncc_mismatch`. On a
        test split pass `class_means` of the training split's result. None takes the class
        means of the samples themselves.
      min_count: classes measured, as in `ncjax.collapse_metrics_from_features`. The ranks
        are of all samples.
      pooling: for features of more than two axes. "flatten" joins all axes after the
        first. "channels_last" averages over all axes but the first and the last (images of
        Flax, tokens); "channels_first" over all axes after the second (images of PyTorch).
      rank_threshold: of `numerical_rank`, see `depth.feature_rank`.
      tunnel_share: share of the last accuracy at which the tunnel starts, see
        `depth.find_tunnel`.

    Returns:
      `Layerwise`. Every layer is computed in its own dtype, half precision in float32.

    Raises:
      ValueError: there is no layer, a shape or value does not fit, or a name is unknown;
        the message names the layer.

    Source: He, Su (PNAS 2023), "A law of data separation in deep learning", for D;
    Masarczyk et al. (NeurIPS 2023) for the rank and the tunnel.

    >>> import numpy as np, ncjax
    >>> labels = np.array([0, 0, 1, 1])
    >>> first = np.array([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    >>> second = first * np.array([[2.0, 0.1]])
    >>> report = ncjax.layerwise({"first": first, "second": second}, labels)
    >>> float(report.metrics.ncc_accuracy[0]), report.names
    (1.0, ('first', 'second'))
    """
    names = _names(features_by_layer, classifiers, centres)
    classifiers, centres = classifiers or {}, centres or {}
    if num_classes is None:
        num_classes = _count_classes(labels, centres)
    measured, class_means = [], {}
    for name in names:
        with _errors_of(name):
            metrics, class_means[name] = layer_metrics(
                features_by_layer[name],
                labels,
                num_classes,
                classifier=classifiers.get(name),
                centres=centres.get(name),
                min_count=min_count,
                pooling=pooling,
                rank_threshold=rank_threshold,
            )
        measured.append(metrics)
    return over_depth(names, measured, class_means, tunnel_share=tunnel_share)


def layer_metrics(
    features: Array,
    labels: Array,
    num_classes: int,
    *,
    classifier: Any = None,
    centres: Array | None = None,
    min_count: int | None = None,
    pooling: str = "flatten",
    rank_threshold: float = RANK_THRESHOLD,
) -> tuple[LayerMetrics, Array]:
    """Measure one layer: return its metrics, scalars, and its class means (K, d).

    Args:
      features: (N, d), or (N, ...) with positions.
      labels: (N,) integers in [0, K).
      num_classes: K.
      classifier: W (K, d), or a pair (W, b) with b (K,); None for none.
      centres: (K, d) class centres; None for the class means of the samples.
      min_count: as in `layerwise`.
      pooling: as in `layerwise`.
      rank_threshold: as in `layerwise`.

    Raises:
      ValueError: as in `layerwise`.
    """
    rows, labels = check_samples(pool(features, pooling), labels, num_classes, min_count)
    shape = (num_classes, rows.shape[1])
    if centres is not None:
        centres = check_centres(centres, shape)
    rows = widen(rows)
    W, b = _weight_and_bias(classifier, shape, rows.dtype)
    metrics, means = _collapse(rows, labels, num_classes, min_count, centres, W, b)
    if classifier is None:
        missing = on_device(np.nan, rows.dtype)
        metrics |= {"accuracy": missing, "ncc_mismatch": missing}
    rank = feature_rank(rows, threshold=rank_threshold)
    dim = on_device(shape[1], jnp.int32)
    return LayerMetrics(dim=dim, **metrics, **rank._asdict()), means


def over_depth(
    names: Sequence[str],
    measured: Sequence[LayerMetrics],
    class_means: Mapping[str, Array] | None = None,
    *,
    tunnel_share: float = TUNNEL_SHARE,
) -> Layerwise:
    """Join the metrics of single layers, and fit the law and find the tunnel over depth.

    Args:
      names: of the L layers, from the input on.
      measured: L results of `layer_metrics`.
      class_means: (K, d) by the name of the layer; None for none.
      tunnel_share: as in `layerwise`.

    Raises:
      ValueError: there is no layer, or names and layers differ in number.
    """
    if not measured or len(names) != len(measured):
        raise ValueError(
            "expected metrics of at least one layer, and a name for each, got "
            f"{len(names)} names and {len(measured)} layers"
        )
    columns = zip(*measured, strict=True)
    metrics = LayerMetrics(*(_stacked(column) for column in columns))
    return Layerwise(
        names=tuple(names),
        metrics=metrics,
        law=separation_law(metrics.fuzziness),
        tunnel=find_tunnel(
            metrics.ncc_accuracy, metrics.numerical_rank, share=tunnel_share
        ),
        class_means=dict(class_means or {}),
    )


def pool(features: Any, pooling: str = "flatten") -> np.ndarray | Array:
    """Return features (N, d) of features (N, ...), as `layerwise` says of `pooling`.

    Features (N, d) pass unchanged. NumPy arrays and PyTorch tensors become NumPy arrays.

    Raises:
      ValueError: pooling is unknown, or features have fewer than two axes.
    """
    check_choice("pooling", pooling, POOLINGS)
    array = read_array("features", features)
    if array.ndim < 2:
        raise ValueError(f"expected features (N, d) or (N, ...), got {array.shape}")
    if array.ndim == 2:
        return array
    if pooling == "flatten":
        return array.reshape(len(array), -1)
    positions = (2, array.ndim) if pooling == "channels_first" else (1, array.ndim - 1)
    if array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    return array.mean(axis=tuple(range(*positions)))


@partial(jax.jit, static_argnums=(2, 3))
def _collapse(
    features, labels, num_classes: int, min_count: int | None, centres, W, b
) -> tuple[dict[str, Array], Array]:
    """Return the metrics of both passes by name, and the class means."""
    # No metric depends on the scale of the features; their squares may overflow.
    scale = power_of_two(features)
    features = features / scale
    if centres is not None:
        centres = centres.astype(features.dtype) / scale
    first_pass = statistics.class_statistics(features, labels, num_classes)
    measured = statistics.measured_classes(first_pass, min_count)
    means = statistics.about_mean(first_pass, "class_mean", measured)
    W, b = at_unit_scale((W, b / scale))
    against = statistics.reference(first_pass, centres=centres, min_count=min_count)
    empty = statistics.init_comparison(num_classes, features.dtype)
    seen = statistics.compare(empty, first_pass, against, features, labels, W, b)
    samples = jnp.sum(seen.counts, dtype=jnp.int32)

    def share(counts):
        total = jnp.sum(counts, dtype=jnp.int32)
        return statistics.fraction(total, samples, features.dtype)

    metrics = {
        "within_class_variation": jnp.sum(seen.whitened_scatter)
        / samples.astype(features.dtype),
        "within_class_quotient": within_class_quotient(first_pass, min_count=min_count),
        "cdnv": class_distance_normalised_variance(first_pass, min_count=min_count),
        "fuzziness": _fuzziness(first_pass, features, labels, measured),
        "mean_norm_variation": measures.norm_variation(means, mask=measured),
        "mean_cosine_deviation": measures.cosine_deviation(means, mask=measured),
        "ncc_accuracy": share(seen.counts - seen.ncc_errors),
        "accuracy": share(seen.counts - seen.errors),
        "ncc_mismatch": share(seen.mismatches),
    }
    return metrics, scale * statistics.class_means(first_pass)


def _fuzziness(first_pass, features, labels, measured: Array | None) -> Array:
    r"""Return $\operatorname{Tr}(\Sigma_W \mathrm{SS}_b^+)$ of the measured classes."""
    dtype, counts = features.dtype, first_pass.counts
    if measured is not None:
        counts = jnp.where(measured, counts, 0)
    samples = jnp.sum(counts, dtype=jnp.int32)
    weights = jnp.sqrt(statistics.fraction(counts, samples, dtype))
    means = statistics.about_mean(first_pass, "sample_mean", measured)
    _, whitening = whiten(statistics.complement(weights, weights[:, None] * means))
    deviation = statistics.deviations(first_pass, features, labels)
    squares = jnp.sum(matmul(deviation, whitening.T) ** 2, axis=1)
    if measured is not None:
        squares = jnp.where(measured[labels], squares, 0)
    fuzziness = jnp.sum(squares) / samples.astype(dtype)
    return jnp.where(jnp.any(means != 0), fuzziness, jnp.nan)


def _stacked(values: Sequence[Array]) -> Array:
    """Return scalars as an array (L,), in the widest of their dtypes."""
    dtype = np.result_type(*(value.dtype for value in values))
    return jnp.stack([value.astype(dtype) for value in values])


def _weight_and_bias(classifier, shape: tuple[int, int], dtype) -> tuple[Array, Array]:
    """Return W (K, d) and b (K,) of a classifier; zeros if there is none.

    One program then serves layers with and without a classifier.

    Raises:
      ValueError: a shape does not fit.
    """
    is_pair = isinstance(classifier, tuple) and len(classifier) == 2
    W, b = classifier if is_pair else (classifier, None)
    if W is None:
        W = on_device(np.zeros(shape), dtype)
    W, b = check_classifier(W, b, shape)
    b = on_device(np.zeros(shape[0]), dtype) if b is None else b.astype(dtype)
    return W.astype(dtype), b


def _names(features_by_layer, classifiers, centres) -> list[str]:
    """Return the names of the layers.

    Raises:
      ValueError: there is no layer, or an argument names a layer that has no features.
    """
    if not isinstance(features_by_layer, Mapping) or not features_by_layer:
        given = type(features_by_layer).__name__
        raise ValueError(
            f"features_by_layer must be a dict of features by the name of the layer, with "
            f"at least one layer, got {given}"
        )
    names = list(features_by_layer)
    for argument, given in (("classifiers", classifiers), ("centres", centres)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{argument} must be a dict by the name of the layer, got "
                f"{type(given).__name__}"
            )
        if unknown := [name for name in given or {} if name not in features_by_layer]:
            raise ValueError(
                f"{argument} names layer {unknown[0]!r}, which features_by_layer lacks; it "
                f"has {', '.join(map(repr, names))}"
            )
    if centres and (missing := [name for name in names if name not in centres]):
        raise ValueError(
            f"centres lacks layer {missing[0]!r}: give the class means of every layer"
        )
    return names


def _count_classes(labels, centres: Mapping[str, Array]) -> int:
    """Return K from the centres of a layer, or from the labels.

    Raises:
      ValueError: the labels are unknown here, or there are none.
    """
    for given in centres.values():
        return len(read_array("centres", given))
    known = concrete(as_array("labels", labels))
    if known is None or not known.size:
        raise ValueError("give num_classes: the labels are unknown here, or there are none")
    return int(known.max()) + 1


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Put the name of the layer before a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
