"""Values to compare with if there are more classes than dimensions, as the page says."""

import numpy as np
import pytest

from ncjax import measures

K, D = 40, 8
FLOOR = np.sqrt(2 - 2 * np.sqrt(D / (K - 1)))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def tight_frame():
    """Rows (K, D) about the origin whose columns are orthonormal: waves on K points."""
    angles = 2 * np.pi * np.outer(np.arange(K), np.arange(1, D // 2 + 1)) / K
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def test_a_tight_frame_reaches_the_least_etf_error():
    frame = tight_frame()
    np.testing.assert_allclose(measures.etf_gram_error(frame), FLOOR, rtol=1e-12)
    np.testing.assert_allclose(measures.product_etf_error(frame, frame), FLOOR, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_rows_have_a_smaller_error(seed):
    rng = np.random.default_rng(seed)
    spread = rng.exponential(size=D) ** rng.uniform(0, 2)
    rows = tight_frame() + 0.1 * seed * rng.normal(size=(K, D)) * spread
    others = rows + 0.1 * seed * rng.normal(size=(K, D))
    assert measures.etf_gram_error(rows) >= FLOOR - 1e-12
    assert measures.product_etf_error(rows, others) >= FLOOR - 1e-12


def test_the_mean_squared_cosine_is_at_least_welchs_bound():
    bound = (K - D) / (D * (K - 1))
    squares = np.asarray(measures.pair_cosines(tight_frame())) ** 2
    np.testing.assert_allclose(squares.mean(), bound, rtol=1e-12)
    rows = np.random.default_rng(0).normal(size=(K, D))
    assert np.mean(np.asarray(measures.pair_cosines(rows)) ** 2) > bound


def test_random_directions_have_the_mean_cosine_of_the_page():
    dim, rows = 768, np.random.default_rng(0).normal(size=(300, 768))
    deviation = measures.cosine_deviation(rows)
    np.testing.assert_allclose(deviation, np.sqrt(2 / (np.pi * dim)), rtol=0.03)
