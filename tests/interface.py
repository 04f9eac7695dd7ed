"""A call of every public function on healthy points, and how to compare two runs."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from ncjax import (
    conventions,
    depth,
    layers,
    losses,
    measures,
    separation,
    statistics,
    variants,
)
from ncjax.metrics import classifier, collapse, directions
from ncjax.peeled import alternatives

K, N, D, SAMPLES = 4, 2, 6, 16
PUBLIC = (ncjax, losses, separation, measures, statistics, variants)
PUBLIC += (classifier, collapse, conventions, directions, depth, layers, alternatives)


class Points(NamedTuple):
    """Inputs, all of them arrays on a device."""

    params: ncjax.Params  # with positive margins
    start: ncjax.Params  # near the origin
    features: jax.Array  # (N, d)
    labels: jax.Array  # (N,)
    W: jax.Array  # (K, d)
    b: jax.Array  # (K,)
    others: jax.Array  # (K, d)
    mask: jax.Array  # (N,)
    log_times: jax.Array  # (2,)
    key: jax.Array


def points(dtype=np.float64):
    """Return the inputs in a dtype, the same numbers in each."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape)

    labels = np.arange(SAMPLES) % K
    centres = 2 * np.eye(K, D)
    noise = 0.1 * normal(K, N, D)
    arrays = Points(
        params=ncjax.Params(centres + 0.1 * normal(K, D), centres[:, None] + noise),
        start=ncjax.Params(0.3 * normal(K, D), 0.3 * normal(K, N, D)),
        features=centres[labels] + 0.3 * normal(SAMPLES, D),
        labels=labels.astype(np.int32),
        W=centres + 0.3 * normal(K, D),
        b=normal(K),
        others=centres + 0.3 * normal(K, D),
        mask=np.arange(SAMPLES) != 5,
        log_times=np.array([0.0, 1.0]),
        key=jax.random.key(0),
    )

    def on_device(array):
        if isinstance(array, jax.Array):
            return array
        return jnp.asarray(array, dtype if array.dtype.kind == "f" else array.dtype)

    return jax.tree.map(on_device, arrays)


def _first_pass(p):
    return statistics.class_statistics(p.features, p.labels, K)


def _second_pass(p):
    first = _streamed(p)
    empty = statistics.init_comparison(K, first.anchor.dtype)
    against = statistics.reference(first)
    return statistics.compare(empty, first, against, p.features, p.labels, p.W, p.b, p.mask)


def _streamed(p):
    empty = statistics.init(K, D, p.features.dtype)
    return statistics.update(empty, p.features, p.labels, p.mask)


def _merged_over_an_axis(p):
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (p.features, p.labels))

    def one(features, labels):
        empty = statistics.init(K, D, features.dtype)
        seen = statistics.update(empty, features, labels)
        return statistics.all_merge(seen, "devices")

    return jax.vmap(one, axis_name="devices")(*halves)


def _numbers(report):
    """Return the fields of a report on layers that are arrays."""
    return report.metrics, report.law, report.tunnel, report.class_means


def _decay():
    return ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.1))


def _flattened(params):
    """A point whose rows leave one direction free; the sign of the direction is free."""
    return jax.tree.map(lambda leaf: leaf.at[..., -1].set(0), params)


def _deep(p):
    """A point of two layers with positive margins."""
    middle = jnp.eye(D, dtype=p.W.dtype) + 0.05 * p.params.W.T @ p.params.W
    return ncjax.DeepParams((middle, p.params.W), p.params.H)


def _quartic(x):
    return jnp.sum(x**4)


def _eigenvalues(eig):
    """The signs of eigenvectors are free."""
    return eig.eigenvalues, jax.tree.map(jnp.abs, eig.eigenvectors), eig.converged


CALLS = {
    "deep.init_deep_params": lambda p: ncjax.init_deep_params(
        p.key, K, N, (D, D), dtype=p.W.dtype
    ),
    "codes.softmax_codes": lambda p: [
        code.params for code in ncjax.softmax_codes(K, 2, N, dtype=p.W.dtype).values()
    ],
    "geometry.init_params": lambda p: ncjax.init_params(p.key, K, N, D, dtype=p.W.dtype),
    "geometry.simplex_etf": lambda p: (
        ncjax.simplex_etf(K, D, p.key, dtype=p.W.dtype),
        ncjax.simplex_etf(K, D, dtype=p.W.dtype),
    ),
    "geometry.block_saddle": lambda p: ncjax.block_saddle(2, 2, N, D, dtype=p.W.dtype),
    "geometry.squared_norm": lambda p: ncjax.squared_norm(p.params),
    "geometry.margins": lambda p: ncjax.margins(p.params),
    "margin_bound.margin_ratio": lambda p: (
        ncjax.margin_ratio(p.params),
        ncjax.margin_ratio(_deep(p)),
        ncjax.margin_ratio(p.params, value=5.0),
    ),
    "geometry.balance": lambda p: ncjax.balance(p.params),
    "losses.cross_entropy": lambda p: ncjax.cross_entropy(p.params),
    "losses.log_cross_entropy": lambda p: ncjax.log_cross_entropy(p.params),
    "losses.log_softplus": lambda p: losses.log_softplus(p.b),
    "losses.error_slopes": lambda p: losses.error_slopes(p.params),
    "losses.softmax_cross_entropy": lambda p: losses.softmax_cross_entropy(
        p.features[:, :K], p.labels
    ),
    "alternatives.smoothed_cross_entropy": lambda p: losses.smoothed_cross_entropy(
        p.params, 0.1
    ),
    "alternatives.focal_loss": lambda p: losses.focal_loss(p.params, 2.0),
    "alternatives.log_focal_loss": lambda p: losses.log_focal_loss(p.params, 2.0),
    "alternatives.squared_error": lambda p: losses.squared_error(p.params),
    "minimisers.minimiser": lambda p: (
        ncjax.minimiser(
            ncjax.Objective(weight_decay=(0.1, 0.1)), (N,) * K, D, dtype=p.W.dtype
        ).params
    ),
    "step.minority_collapse_ratio": lambda p: jnp.asarray(
        ncjax.minority_collapse_ratio(2, 2, ball=(16, 4)), p.W.dtype
    ),
    "spectra.spectrum": lambda p: jnp.asarray(
        ncjax.spectrum(
            ncjax.Objective(weight_decay=(0.1, 0.1)), (N,) * K, D
        ).multiplicities,
        p.W.dtype,
    ),
    "saddles.block_point": lambda p: (
        ncjax.block_point(
            ncjax.Objective(weight_decay=(0.1, 0.1)), 2, 2, N, D, dtype=p.W.dtype
        ).params
    ),
    "saddles.rank_point": lambda p: (
        ncjax.rank_point(
            ncjax.Objective("squared_error", weight_decay=(0.1, 0.1)), 2, K, N, D, p.W.dtype
        ).params
    ),
    "weights.sample_weights": lambda p: ncjax.sample_weights((N,) * K, dtype=p.W.dtype),
    "nearest.nearest_code": lambda p: ncjax.nearest_code(p.params)[1:],
    "polygon.polygon_saddle": lambda p: (
        ncjax.polygon_saddle(K, N, D, dtype=p.W.dtype).params
    ),
    "optimum.solve_separation": lambda p: [
        ncjax.solve_separation(
            (N, N, 1, 1), D, depth=depth, starts=2, dtype=p.W.dtype
        )._replace(source=None, spread=None)
        for depth in (1, 2)
    ],
    "optimum.separation_value": lambda p: ncjax.separation_value((N, N, 1, 1)),
    "separation.kkt": lambda p: (
        ncjax.kkt(p.params),
        ncjax.kkt(p.params, multipliers="nnls"),
        ncjax.kkt(_deep(p)),
    ),
    "separation.certificate": lambda p: separation.certificate(p.params),
    "certificates.certificate": lambda p: (
        ncjax.certificate(_flattened(p.params), _decay())._replace(direction=None),
        ncjax.certificate(p.params),
        ncjax.certificate(_deep(p)),
    ),
    "deep_collapse.decayed_collapse": lambda p: (
        ncjax.decayed_collapse(K, N, 2, 0.05, dtype=p.W.dtype).minimum.params
    ),
    "separation.orthogonal_to_rows": lambda p: (
        p.W @ separation.orthogonal_to_rows(p.W, p.W[:, None], jnp.asarray(1e-5, p.W.dtype))
    ),
    "separation.kkt_angle": lambda p: (
        ncjax.kkt_angle(p.params),
        ncjax.kkt_angle(_deep(p)),
    ),
    "solve.gradient_flow": lambda p: (
        ncjax.gradient_flow(
            p.start, p.log_times, rtol=1e-3, record=ncjax.squared_norm
        ).recorded,
        ncjax.gradient_flow(
            p.start, times=p.log_times, objective=_decay(), rtol=1e-3
        ).value,
    ),
    "descent.gradient_descent": lambda p: ncjax.gradient_descent(p.start, 0.1, 3),
    "invariants.invariant_drift": lambda p: ncjax.invariant_drift(p.params, p.start),
    "invariants.restore_invariants": lambda p: ncjax.restore_invariants(
        jax.tree.map(lambda leaf: 1.01 * leaf, p.params), p.params
    ),
    "hessian.hvp": lambda p: ncjax.hvp(
        ncjax.log_cross_entropy, p.params, p.start, sphere=True
    ),
    "landscape.hessian_eig": lambda p: tuple(
        _eigenvalues(
            ncjax.hessian_eig(_quartic, p.W, which="largest", method=method, num_vectors=6)
        )
        for method in ("dense", "lanczos")
    ),
    "landscape.spectral_density": lambda p: ncjax.spectral_density(
        _quartic, p.W, num_steps=3, num_probes=2, num_points=5
    ),
    "by_layer.collapse_by_layer": lambda p: ncjax.collapse_by_layer(
        ncjax.DeepParams((p.W.T @ p.W, p.W), p.params.H)
    ),
    "collapse.collapse_metrics": lambda p: ncjax.collapse_metrics(p.params),
    "collapse.collapse_metrics_from_features": lambda p: (
        ncjax.collapse_metrics_from_features(p.features, p.labels, p.W, p.b),
        ncjax.collapse_metrics_from_features(p.features, p.labels, p.W, chunk_size=5),
    ),
    "collapse.metrics_from_statistics": lambda p: collapse.metrics_from_statistics(
        _streamed(p), _second_pass(p), p.W
    ),
    "collapse.within_class_quotient": lambda p: collapse.within_class_quotient(
        _first_pass(p)
    ),
    "collapse.class_distance_normalised_variance": lambda p: (
        collapse.class_distance_normalised_variance(_first_pass(p))
    ),
    "collapse.metrics_of_means": lambda p: collapse.metrics_of_means(_first_pass(p), p.W),
    "collapse.pair_metrics": lambda p: collapse.pair_metrics(_first_pass(p), p.W),
    "duality.duality_parts": lambda p: ncjax.duality_parts(p.features, p.labels, p.W, p.b),
    "peeling.last_layer": lambda p: ncjax.last_layer(p.features, p.labels, p.W, p.b),
    "peeling.balance_norms": lambda p: ncjax.balance_norms(p.params),
    "peeling.peel": lambda p: ncjax.peel(p.features, p.labels, p.W, p.b, per_class=2),
    "layers.layerwise": lambda p: _numbers(
        ncjax.layerwise(
            {"first": p.features, "last": jnp.abs(p.features)},
            p.labels,
            num_classes=K,
            classifiers={"first": p.W, "last": (p.W, p.b)},
        )
    ),
    "layers.layer_metrics": lambda p: layers.layer_metrics(
        p.features, p.labels, K, classifier=p.W, min_count=2
    ),
    "layers.over_depth": lambda p: _numbers(
        layers.over_depth(
            ("first", "last"),
            [
                layers.layer_metrics(rows, p.labels, K, classifier=p.W)[0]
                for rows in (p.features, jnp.abs(p.features))
            ],
        )
    ),
    "layers.pool": lambda p: layers.pool(p.params.H, "channels_last"),
    "depth.feature_rank": lambda p: depth.feature_rank(p.features),
    "depth.separation_law": lambda p: depth.separation_law(jnp.exp(p.b)),
    "depth.find_tunnel": lambda p: depth.find_tunnel(jnp.abs(p.b), jnp.abs(p.W[:, 0])),
    "measures.centre_rows": lambda p: measures.centre_rows(p.W),
    "measures.unit_rows": lambda p: measures.unit_rows(p.W),
    "measures.norm_variation": lambda p: measures.norm_variation(p.W),
    "measures.pair_cosines": lambda p: measures.pair_cosines(p.W),
    "measures.cosine_deviation": lambda p: measures.cosine_deviation(p.W),
    "measures.etf_gram_error": lambda p: measures.etf_gram_error(p.W),
    "measures.product_etf_error": lambda p: measures.product_etf_error(p.W, p.others),
    "measures.tile_cosines": lambda p: measures.tile_cosines(p.W, p.others),
    "measures.tile_squared_distances": lambda p: measures.tile_squared_distances(
        p.W, p.others, jnp.ones((K, K), bool)
    ),
    "measures.distances_of_rows": lambda p: measures.distances_of_rows(p.W),
    "measures.simplex_cosine": lambda p: measures.simplex_cosine(p.W, p.b > 0),
    "measures.nonzero_rows": lambda p: measures.nonzero_rows(p.W, p.b > 0),
    "measures.self_duality": lambda p: measures.self_duality(p.W, p.others),
    "measures.row_cosines": lambda p: measures.row_cosines(p.W, p.others),
    "measures.row_dots": lambda p: measures.row_dots(p.W, p.others),
    "measures.row_distances": lambda p: measures.row_distances(p.W, p.others),
    "statistics.init": lambda p: statistics.init(K, D, p.W.dtype),
    "statistics.class_statistics": _first_pass,
    "statistics.update": _streamed,
    "statistics.merge": lambda p: statistics.merge(_first_pass(p), _streamed(p)),
    "statistics.all_merge": _merged_over_an_axis,
    "statistics.add": lambda p: statistics.add(
        _first_pass(p), p.features, p.labels, p.mask
    ),
    "statistics.complement": lambda p: statistics.complement(jnp.abs(p.b), p.W),
    "statistics.mean_shift": lambda p: statistics.mean_shift(_first_pass(p), _streamed(p)),
    "statistics.batch_classes": lambda p: statistics.batch_classes(p.labels, p.mask, K),
    "statistics.count_dtype": lambda p: jnp.zeros((), statistics.count_dtype()),
    "statistics.total": lambda p: statistics.total(
        _first_pass(p).counts, p.W.dtype, p.b > 0
    ),
    "statistics.class_means": lambda p: statistics.class_means(_first_pass(p)),
    "statistics.global_mean": lambda p: statistics.global_mean(_first_pass(p)),
    "statistics.centred_means": lambda p: statistics.centred_means(
        _first_pass(p), "sample_mean"
    ),
    "statistics.measured_classes": lambda p: statistics.measured_classes(_first_pass(p), 2),
    "statistics.about_mean": lambda p: statistics.about_mean(
        _first_pass(p), "class_mean", jnp.arange(K) > 0
    ),
    "statistics.class_variances": lambda p: statistics.class_variances(
        _first_pass(p), jnp.arange(K) > 0
    ),
    "statistics.same_samples": lambda p: statistics.same_samples(
        _streamed(p), _second_pass(p), None
    ),
    "statistics.deviations": lambda p: statistics.deviations(
        _first_pass(p), p.features, p.labels
    ),
    "statistics.reference": lambda p: statistics.reference(_first_pass(p)).distances,
    "statistics.squared_distances": lambda p: statistics.squared_distances(p.W),
    "statistics.init_comparison": lambda p: statistics.init_comparison(K, p.W.dtype),
    "statistics.compare": _second_pass,
    "statistics.fraction": lambda p: statistics.fraction(
        p.labels + 1, p.labels + 2, p.W.dtype
    ),
    "conventions.measure": lambda p: conventions.measure(
        "guiding", p.features, p.labels, p.W, p.b
    ),
    "result.analyze": lambda p: ncjax.analyze(p.features, p.labels, p.W, p.b).report,
    "variants.within_class_variation": lambda p: variants.within_class_variation(
        p.features, p.labels, K
    ),
    "variants.variability_collapse_index": lambda p: variants.variability_collapse_index(
        p.features, p.labels, K
    ),
    "variants.nuclear_over_frobenius": lambda p: variants.nuclear_over_frobenius(
        p.features, p.labels, K
    ),
    "variants.average_squared_norm": lambda p: variants.average_squared_norm(
        _first_pass(p)
    ),
    "variants.mean_logits_norm": lambda p: variants.mean_logits_norm(
        _first_pass(p), p.W, p.b
    ),
    "variants.nearest_centre_accuracy": lambda p: variants.nearest_centre_accuracy(
        p.features, p.labels, K
    ),
    "variants.ncc_agreement": lambda p: variants.ncc_agreement(
        p.features, p.labels, p.W, p.b
    ),
    "variants.ood_cosines": lambda p: variants.ood_cosines(p.W, p.others[0]),
    "directions.uniformity_kernel": lambda p: [
        directions.uniformity_kernel(p.W, kernel) for kernel in directions.KERNELS
    ],
    "directions.uniformity_moments": lambda p: [
        directions.uniformity_moments(p.W, kernel) for kernel in directions.KERNELS
    ],
    "directions.one_vs_rest_distances": lambda p: directions.one_vs_rest_distances(p.W),
    "classifier.cosine_margins": lambda p: classifier.cosine_margins(
        p.features, p.labels, p.W
    ),
    "classifier.logit_margins": lambda p: classifier.logit_margins(
        p.features, p.labels, p.W, p.b
    ),
    "classifier.mean_cross_entropy": lambda p: classifier.mean_cross_entropy(
        p.features, p.labels, p.W, p.b
    ),
    "classifier.mean_squared_error": lambda p: classifier.mean_squared_error(
        p.features, p.labels, p.W, p.b
    ),
    "classifier.squared_error_parts": lambda p: classifier.squared_error_parts(
        p.features, p.labels, p.W, p.b
    ),
}

# Compiled by themselves: these need no `jax.jit` to transfer nothing implicitly.
COMPILED = (
    "by_layer.collapse_by_layer",
    "collapse.collapse_metrics",
    "collapse.collapse_metrics_from_features",
    "descent.gradient_descent",
    "landscape.hessian_eig",
    "landscape.spectral_density",
    "peeling.last_layer",
    "statistics.class_statistics",
    "statistics.squared_distances",
    "variants.ncc_agreement",
    "variants.nearest_centre_accuracy",
    "variants.within_class_variation",
)
OUTSIDE_JAX = "directions.one_vs_rest_distances"
# Python's floats, so not under jax.jit.
RETURNS_FLOATS = ("conventions.measure", "nearest.nearest_code", "result.analyze")
RANDOM = (
    "deep.init_deep_params",
    "geometry.init_params",
    "geometry.simplex_etf",
    "landscape.spectral_density",
)


def public_names():
    """Return the function names of the public modules, `wing.function`."""
    names = set()
    for module in PUBLIC:
        for name in dir(module):  # also names that load on first use
            value = getattr(module, name)
            if name[0] == "_" or inspect.isclass(value) or not callable(value):
                continue
            home = value.__module__
            if home == module.__name__ or (module is ncjax and home.startswith("ncjax.")):
                names.add(f"{home.rpartition('.')[2]}.{name}")
    return names


def evaluate(inputs, names=CALLS):
    """Return results by name. Raise AssertionError with every call that fails."""
    results, errors = {}, []
    for name in names:
        try:
            results[name] = jax.block_until_ready(CALLS[name](inputs))
        except Exception as error:
            errors.append(f"{name}: {error!r}")
    assert errors == [], "\n".join(errors)
    return jax.device_get(results)


def compiled(inputs):
    """Return the results in one program of all calls that `jax.jit` takes."""
    names = [name for name in CALLS if name not in (OUTSIDE_JAX, *RETURNS_FLOATS)]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def all_calls(inputs):
        known = inputs._replace(labels=labels)  # ncjax.peel needs them
        return {name: CALLS[name](known) for name in names}

    labels = inputs.labels
    return jax.device_get(all_calls(inputs._replace(labels=None)))


@functools.cache
def expected(name):
    """Return the result of one call in the plain run, in float64."""
    return evaluate(points(), (name,))[name]


def assert_as_expected(results, rtol=1e-9):
    """Assert that results by name equal the plain run's."""
    for name, result in results.items():
        jax.tree.map(
            lambda got, right, name=name: np.testing.assert_allclose(
                got, right, rtol=rtol, atol=rtol, err_msg=name
            ),
            result,
            expected(name),
        )
