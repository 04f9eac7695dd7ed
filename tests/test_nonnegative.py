"""Non-negative least squares in one program, against SciPy's active-set solver."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.optimize import nnls
from strategies import random_params

import ncjax
from experiments._saddles import Block
from ncjax.peeled.multipliers import _by_program, _by_scipy, combination, finite_margins
from ncjax.peeled.nonnegative import nonnegative_least_squares

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = ROWS, COLUMNS = 30, 12


def systems():
    """Matrices and targets: random, of dependent columns, and with known minimisers."""
    rng = np.random.default_rng(0)
    random, positive = rng.normal(size=SHAPE), rng.uniform(size=SHAPE)
    repeated = random[:, np.arange(COLUMNS) % 5] * rng.uniform(0.1, 10, COLUMNS)
    combined = positive @ rng.uniform(size=(COLUMNS, COLUMNS))
    empty = np.where(np.arange(COLUMNS) == 3, 0, random)
    target, few = rng.normal(size=ROWS), np.maximum(rng.normal(size=COLUMNS), 0)
    return {
        "random": (random, target),
        "random, far apart in scale": (random * 10.0 ** np.arange(-6, 6), 1e5 * target),
        "repeated columns": (repeated, target),
        "repeated columns, no residual": (repeated, repeated @ few),
        "rank 1": (np.outer(positive[:, 0], few + 1), target + 1),
        "columns of one cone": (combined, target),
        "no residual": (random, random @ few),
        "zero is the solution": (positive, -positive @ few),
        "zero target": (random, 0 * target),
        "zero column": (empty, target),
        "nearly dependent": (1 / (1.0 + np.add.outer(range(ROWS), range(COLUMNS))), target),
    }


@pytest.mark.parametrize(("dtype", "excess"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_the_residual_is_that_of_scipy(dtype, excess):
    matrices, targets = (
        np.array(arrays, dtype) for arrays in zip(*systems().values(), strict=True)
    )
    allowed = np.ones(COLUMNS, bool)
    solve = jax.jit(jax.vmap(nonnegative_least_squares, (0, 0, None)))
    found = np.asarray(solve(matrices, targets, allowed), float)
    assert (found >= 0).all()
    for name, matrix, target, x in zip(systems(), matrices, targets, found, strict=True):
        matrix, target = matrix.astype(float), target.astype(float)
        _, least = nnls(matrix, target)
        residual = np.linalg.norm(matrix @ x - target)
        assert residual <= least + excess * np.linalg.norm(target), name


def test_columns_that_are_not_allowed_stay_out():
    allowed = np.arange(COLUMNS) % 3 > 0
    matrix, target = systems()["random"]
    found = np.asarray(jax.jit(nonnegative_least_squares)(matrix, target, allowed))
    expected, _ = nnls(matrix[:, allowed], target)
    np.testing.assert_allclose(found[allowed], expected, atol=1e-15)
    assert not found[~allowed].any()
    matrix[3, 4] = np.nan
    found = jax.jit(nonnegative_least_squares)(matrix, target, allowed)
    assert np.isnan(found).all()


def near(block, distance):
    """Return a point near a KKT point, with least margin 1."""
    noise = random_params(1, block.num_classes, block.per_class, block.dim, distance)
    W, H = (np.add(*pair) for pair in zip(block.params(2.0), noise, strict=True))
    root = np.sqrt(oracles.margins(W, H).min())
    return ncjax.Params(W / root, H / root)


@jax.jit
def multipliers_and_misfits(params, weights):
    """Multipliers by the program and by SciPy, with √(|Z̃ - Σ λ ∇m|² + Σ λ² (m̃ - 1)²)."""

    def misfit(found):
        rest = jax.tree.map(jnp.subtract, params, combination(found, params))
        slack = found * (finite_margins(params) - 1)
        return jnp.sqrt(ncjax.squared_norm(rest) + jnp.sum(slack**2))

    both = _by_program(params, weights), _by_scipy(params, weights)
    return *both, *map(misfit, both)


SMALL = Block(1, 4, 3, 6), Block(2, 2, 3, 6)
LARGE = Block(1, 10, 5, 20), Block(5, 2, 5, 20)


CASES = [
    *(pytest.param(block, distance) for block in SMALL for distance in (0.0, 1e-6, 1e-2)),
    *(
        pytest.param(block, distance, marks=pytest.mark.slow)
        for block, distance in (
            *((LARGE[0], distance) for distance in (0.0, 1e-6, 1e-2)),
            *((LARGE[1], distance) for distance in (0.0, 1e-2)),
        )
    ),
]


@pytest.mark.parametrize(("block", "distance"), CASES, ids=str)
def test_multipliers_fit_as_well_as_those_of_scipy(block, distance):
    weights = np.ones((block.num_classes, block.per_class))
    weights[1, 2] = 0
    params = near(block, distance)
    found, expected, misfit, least = multipliers_and_misfits(params, weights)
    assert (np.asarray(found) >= 0).all()
    assert not np.asarray(found)[1, 2].any()
    # SciPy stops 5e-8 above the minimum at the large saddle.
    assert misfit <= (1 + 1e-12) * least + 1e-14
    if block.num_blocks == 1:  # the minimiser is unique
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.slow
def test_multipliers_of_several_layers_fit_as_well_as_those_of_scipy():
    W, H = near(SMALL[1], 1e-2)
    params = ncjax.DeepParams((np.eye(6) + 0.05 * W.T @ W, W), H)
    *_, misfit, least = multipliers_and_misfits(params, None)
    assert misfit <= (1 + 1e-12) * least
