"""One test for each statement of the paper, on the flow itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import random_params

import ncjax
from experiments import _fits, ulpm_flow

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, D = 4, 3, 6
LOG_TIMES = np.array([1.0, 10.0, 100.0, 300.0, 1000.0])


@pytest.fixture(scope="module")
def flow():
    """Six starts to log t = 1000, leading axes (6, T)."""
    keys = jax.random.split(jax.random.key(1), 6)
    starts = jax.vmap(lambda key: ncjax.init_params(key, K, N, D, 0.3))(keys)
    return jax.vmap(lambda start: ncjax.gradient_flow(start, LOG_TIMES))(starts)


def along(flow, fn):
    """`fn` at every seed and time, (6, T)."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(fn)))(flow.params))


def test_the_flow_collapses(flow):
    metrics = along(flow, ncjax.collapse_metrics)
    assert (metrics.accuracy[:, 1:] == 1).all()
    assert (metrics.ncc_mismatch[:, 1:] == 0).all()
    for name, bound in {
        "within_class_variation": 1e-8,
        "within_class_quotient": 1e-3,
        "mean_norm_variation": 1e-3,
        "centred_classifier_norm_variation": 1e-3,
        "mean_cosine_deviation": 1e-3,
        "centred_classifier_cosine_deviation": 1e-3,
        "centred_self_duality": 2e-3,
    }.items():
        values = getattr(metrics, name)
        assert (values[:, -1] < bound).all(), name
        assert (values[:, -1] < values[:, 1]).all(), name


def test_theorem_3_1_margin_bound(flow):
    ratio = along(flow, ncjax.margin_ratio)
    assert (ratio < 1).all()
    assert (ratio[:, -1] > 0.998).all()
    rng_ratios = [
        float(ncjax.margin_ratio(random_params(s, K, N, D, 1.0))) for s in range(50)
    ]
    assert max(rng_ratios) < 1


def test_theorem_3_2_the_flow_turns_to_a_kkt_direction(flow):
    assert (np.asarray(flow.log_loss[:, 2:]) < np.log(np.log(2))).all()
    angle = along(flow, ncjax.kkt_angle)
    assert (angle[:, -1] < 0.03).all()
    assert (np.diff(angle[:, 2:], axis=1) < 0).all()


def test_rates_and_sharp_constants(flow):
    optimum = (K - 1) * np.sqrt(N)
    norm = along(flow, ncjax.squared_norm)[:, -1] / LOG_TIMES[-1]
    np.testing.assert_allclose(norm, 2 * optimum, rtol=0.02)
    product = np.exp(np.asarray(flow.log_loss[:, -1]) + LOG_TIMES[-1]) * LOG_TIMES[-1]
    np.testing.assert_allclose(product, optimum / 2, rtol=0.02)


def test_invariants_are_conserved(flow):
    assert (np.asarray(flow.drift.balance) < 1e-6).all()
    assert (np.asarray(flow.drift.classifier_sum) < 1e-12).all()


def test_the_centred_classifier_collapses_because_its_sum_is_conserved(flow):
    metrics = along(flow, ncjax.collapse_metrics)
    assert (metrics.self_duality[:, -1] > 5 * metrics.centred_self_duality[:, -1]).all()
    sums = jnp.sum(flow.params.W, axis=2)
    np.testing.assert_allclose(sums[:, 0], sums[:, -1], rtol=1e-9)


@pytest.mark.slow
def test_exponents_of_the_asymptotic_regime(tmp_path):
    import json

    config = ulpm_flow.Config(seeds=12, log_t_max=1e4, workdir=str(tmp_path / "run"))
    folder = ulpm_flow.run(config)
    summary = json.loads((folder / "summary.json").read_text())
    fitted = summary["exponents"]["log t in [1000, 10000]"]
    expected = dict.fromkeys(
        (
            "mean_norm_variation",
            "centred_classifier_norm_variation",
            "mean_cosine_deviation",
            "centred_classifier_cosine_deviation",
            "centred_self_duality",
            "within_class_quotient",
            "margin_deficit",
        ),
        1.0,
    ) | {
        "within_class_variation": 3.0,
        "kkt_angle": 0.5,
        "classifier_norm_variation": 0.5,
        "classifier_cosine_deviation": 0.5,
        "self_duality": 0.5,
    }
    assert {1e3, 1e4} <= {bound for window in _fits.WINDOWS for bound in window}
    for name, exponent in expected.items():
        assert fitted[name]["median"] == pytest.approx(exponent, abs=0.03), name
    constants = summary["sharp_constants"]
    assert constants["|Z|^2 / log t"]["median"] == pytest.approx(40.302, abs=0.01)
    # 10.0502 at tolerances 1e-10 (Tsit5) and 1e-11 (Dopri8), for every start.
    assert constants["t L log t"]["median"] == pytest.approx(10.0502, abs=2e-3)
