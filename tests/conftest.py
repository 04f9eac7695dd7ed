"""Strict numerics for every test: x64, no silent promotion of rank or dtype."""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("ncjax", deadline=None, derandomize=True, max_examples=25)
# By hand: pytest --hypothesis-profile campaign, other examples every time.
settings.register_profile("campaign", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("ncjax")


@pytest.fixture(scope="module")
def quick_compilation():
    """Where nearly all of the time goes to the compiler and nothing hangs on its best."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def full_precision():
    """Products of float32 in float32, on every platform."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
