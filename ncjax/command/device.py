"""Set JAX up for a command."""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np

from ncjax.command.output import BadUse


@contextlib.contextmanager
def ready(float64: bool) -> Iterator[None]:
    """Compute in float64 or float32 inside.

    Raises:
      BadUse: JAX does not find the devices that JAX_PLATFORMS names.
    """
    _check_platforms()
    before = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    # Not `jax.enable_x64`, which callbacks in another thread do not see.
    jax.config.update("jax_enable_x64", float64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _check_platforms() -> None:
    requested = os.environ.get("JAX_PLATFORMS")
    try:
        jax.devices()
    except Exception as error:
        if not requested:
            raise
        raise BadUse(
            f"JAX_PLATFORMS={requested}: JAX finds no such device here; unset the variable "
            "or set it to cpu"
        ) from error
