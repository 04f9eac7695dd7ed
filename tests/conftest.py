"""Strict numerics for every test: x64, no silent promotion of rank or dtype."""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("ncjax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ncjax")


@pytest.fixture
def key():
    return jax.random.key(0)
