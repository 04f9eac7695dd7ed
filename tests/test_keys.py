"""Every function with a PRNG key takes one key of any kind, and refuses all else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.networks import data


def cubes(x):
    return jnp.sum(x**3)


FUNCTIONS = {
    "init_params": lambda key: ncjax.init_params(key, 3, 2, 4),
    "simplex_etf": lambda key: ncjax.simplex_etf(3, 4, key),
    "hessian_eig": lambda key: ncjax.hessian_eig(
        cubes, jnp.arange(1.0, 9.0), method="lanczos", key=key
    ),
    "spectral_density": lambda key: ncjax.spectral_density(
        cubes, jnp.arange(1.0, 9.0), num_steps=3, num_points=5, key=key
    ),
    "augment": lambda key: data.augment(key, jnp.zeros((2, 8, 8, 1), jnp.uint8)),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@pytest.mark.parametrize(
    ("key", "given"),
    [
        (7, "7"),
        (np.int64(7), "7"),
        (True, "True"),
        (0.5, "0.5"),
        ("seed", "'seed'"),
        (np.zeros(2), r"float64 of shape \(2,\)"),
        (np.zeros(3, np.uint32), r"uint32 of shape \(3,\)"),
        (np.uint32(7), "7"),
        (jnp.uint32(7), r"uint32 of shape \(\)"),
    ],
    ids=repr,
)
def test_what_is_no_key_is_refused(name, key, given):
    with pytest.raises(ValueError, match=rf"key must be a PRNG key, .* got .*{given}"):
        FUNCTIONS[name](key)


def test_a_function_that_needs_a_key_refuses_none():
    with pytest.raises(ValueError, match=r"key must be a PRNG key, .* got None"):
        ncjax.init_params(None, 3, 2, 4)


@functions
def test_several_keys_are_refused_with_advice(name, key):
    batches = jax.random.split(key, 5), jax.random.split(jax.random.PRNGKey(0), 5)
    for keys in batches:
        with pytest.raises(ValueError, match=r"keys of shape \(5,\): use jax.vmap"):
            FUNCTIONS[name](keys)


@functions
def test_a_key_of_the_old_kind_gives_the_same_values(name, key):
    call = FUNCTIONS[name]
    old = jax.random.PRNGKey(0)
    expected = call(key)
    for given in (old, np.asarray(old)):
        jax.tree.map(np.testing.assert_array_equal, call(given), expected)


def test_a_key_may_be_traced(key):
    keys = jax.random.split(key, 3)
    drawn = jax.jit(jax.vmap(FUNCTIONS["init_params"]))(keys)
    np.testing.assert_allclose(drawn.W[1], FUNCTIONS["init_params"](keys[1]).W, rtol=1e-14)
