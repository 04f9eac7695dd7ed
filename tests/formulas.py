"""The call of ncjax for each formula of tests/data/collapse_values.json."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from ncjax import measures, statistics, variants
from ncjax.metrics.collapse import (
    class_distance_normalised_variance,
    collapse_metrics_from_features,
    within_class_quotient,
)


def first_pass(data):
    features, labels, W = jnp.asarray(data.features), jnp.asarray(data.labels), data.W
    return statistics.class_statistics(features, labels, len(W))


def means(data, centring="class_mean"):
    return statistics.centred_means(first_pass(data), centring)


def fields(data, bias=True):
    """Fields of `CollapseMetrics` by their name in the reference."""
    b = data.b if bias else None
    metrics = collapse_metrics_from_features(*data[:3], b)._asdict()
    return {oracles.FIELDS[field]: value for field, value in metrics.items()}


def of_features(function, *args, **options):
    return lambda data: function(*data[:2], len(data.W), *args, **options)


def of_classifier(function, **options):
    return lambda data: function(*(jnp.asarray(x) for x in data[:4]), **options)


def normalised(data):
    return data._replace(features=measures.unit_rows(jnp.asarray(data.features)))


def ood_mean(data):
    labels = jnp.asarray(data.ood_labels)
    seen = statistics.class_statistics(
        jnp.asarray(data.ood_features), labels, int(data.ood_labels.max()) + 1
    )
    return statistics.global_mean(seen)


def _calls():
    rows_of = {
        "M.class_mean": means,
        "M.sample_mean": lambda data: means(data, "sample_mean"),
        "W": lambda data: jnp.asarray(data.W),
        "W.centred": lambda data: measures.centre_rows(jnp.asarray(data.W)),
    }
    of_rows = {
        "norm_cv_ddof1": measures.norm_variation,
        "norm_cv_ddof0": lambda rows: measures.norm_variation(rows, ddof=0),
        "cos_absdev": measures.cosine_deviation,
        "cos_mean": lambda rows: jnp.mean(measures.pair_cosines(rows)),
        "cos_std_ddof0": lambda rows: jnp.std(measures.pair_cosines(rows)),
        "max_cos": lambda rows: jnp.max(measures.pair_cosines(rows)),
        "etf_gram_error": measures.etf_gram_error,
    }
    of_pairs = {
        "fro_dist": measures.self_duality,
        "fro_dist_sq": lambda V, C: measures.self_duality(V, C, squared=True),
        "product_etf_error": measures.product_etf_error,
        "cos_mean": lambda V, C: jnp.mean(measures.row_cosines(V, C)),
        "one_minus_cos": lambda V, C: 1 - jnp.mean(measures.row_cosines(V, C)),
        "dot_var_ddof1": lambda V, C: jnp.var(measures.row_dots(V, C), ddof=1),
    }
    calls = {}
    for name, function in of_rows.items():
        for which, rows in rows_of.items():
            calls[f"nc2.{name}.{which}"] = lambda data, f=function, rows=rows: f(rows(data))
    for name, function in of_pairs.items():
        for short, which in {"W": "W", "Wc": "W.centred"}.items():
            for centring in statistics.CENTRINGS:
                rows = rows_of[which], rows_of[f"M.{centring}"]
                calls[f"nc3.{name}.{short}.{centring}"] = (
                    lambda data, f=function, rows=rows: f(*(one(data) for one in rows))
                )
    for centring in statistics.CENTRINGS:
        calls |= {
            f"nc1.pinv_over_K.{centring}": of_features(
                variants.within_class_variation, centring=centring
            ),
            f"nc1.pinv_trace.{centring}": of_features(
                variants.within_class_variation, centring=centring, per_class=False
            ),
            f"nc1.quotient.{centring}": lambda data, centring=centring: (
                within_class_quotient(first_pass(data), centring)
            ),
        }
    for name, kernel in {"dist": "distance", "log": "log", "riesz": "riesz"}.items():
        for suffix, moment in {"mean": jnp.mean, "var_ddof0": jnp.var}.items():
            calls[f"nc2g.{name}.{suffix}"] = lambda data, kernel=kernel, moment=moment: (
                moment(variants.uniformity_kernel(means(data), kernel))
            )
    for part, name in enumerate(("LNC1", "LNC23", "Lperp")):
        calls[f"mse.{name}"] = lambda data, part=part: of_classifier(
            variants.squared_error_parts
        )(data)[part]
    return calls


CALLS = _calls() | {
    "nc1.pinv_over_K.class_mean.Sw_class_balanced": of_features(
        variants.within_class_variation, weighting="class"
    ),
    "nc1.cdnv": lambda data: class_distance_normalised_variance(first_pass(data)),
    "nc1.cdnv_exp2": lambda data: class_distance_normalised_variance(
        first_pass(data), power=2
    ),
    "nc1.vci.sample_mean": of_features(variants.variability_collapse_index),
    "nc1.nuclear_over_fro": lambda data: jnp.mean(
        of_features(variants.nuclear_over_frobenius)(data)
    ),
    "nc1.numerical_rank": lambda data: jnp.mean(
        of_features(variants.nuclear_over_frobenius)(data) ** 2
    ),
    "lpm.avg_sq_feature_norm": lambda data: variants.average_squared_norm(first_pass(data)),
    "nc3.Wmu_plus_b": lambda data: variants.mean_logits_norm(
        first_pass(data), jnp.asarray(data.W), jnp.asarray(data.b)
    ),
    "nc4.ncc_mismatch": lambda data: fields(data)["nc4.ncc_mismatch"],
    "nc4.ncc_mismatch_nobias": lambda data: fields(data, bias=False)["nc4.ncc_mismatch"],
    "nc4.ncc_accuracy": of_features(variants.nearest_centre_accuracy),
    "accuracy": lambda data: fields(data)["accuracy"],
    "loss.ce": of_classifier(variants.mean_cross_entropy),
    "loss.mse_sum_over_classes": of_classifier(variants.mean_squared_error),
    "nc5.ood_abs_cos": lambda data: jnp.mean(
        variants.ood_cosines(statistics.class_means(first_pass(data)), ood_mean(data))
    ),
    "margin.cos_centred_mean": lambda data: jnp.mean(variants.cosine_margins(*data[:3])),
    "margin.zhou_mean": lambda data: jnp.mean(
        variants.cosine_margins(*data[:3], centred_product=False)
    ),
    "margin.logit_min": lambda data: jnp.min(variants.logit_margins(*data[:4])),
    "gnc1.pinv_over_K.normalised": lambda data: of_features(
        variants.within_class_variation, centring="sample_mean"
    )(normalised(data)),
    "gnc2.min_one_vs_rest_distance": lambda data: np.min(
        variants.one_vs_rest_distances(data.W)
    ),
    "gnc3.one_minus_cos": lambda data: (
        1 - jnp.mean(measures.row_cosines(data.W, means(normalised(data), "sample_mean")))
    ),
}


# Their shapes depend on the labels, or their solver is outside JAX.
UNTRACED = ("nc1.nuclear_over_fro", "nc1.numerical_rank", "gnc2.min_one_vs_rest_distance")


def compiled(data, names):
    """Evaluate the named formulas on `data`, in one program for its shapes."""
    return program(tuple(names), tuple(data.ood_labels))(*data[:5])


@cache
def program(names, ood_labels):
    # This rounds as full optimisation does and compiles in half the time.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def traced(*arrays):
        data = oracles.Data(*arrays, np.array(ood_labels))
        return {name: CALLS[name](data) for name in names}

    return traced
