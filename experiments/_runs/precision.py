"""Fail early if a run needs float64 and the device has none."""

import jax

from experiments._runs.errors import BadUse


def check_float64(flag: str = "") -> None:
    """Raise BadUse on a TPU, which does not compute in float64.

    Args:
      flag: the flag that avoids float64, if there is one.
    """
    if jax.default_backend() == "tpu":
        either = f"give {flag}, or " if flag else ""
        raise BadUse(
            f"this needs float64, which a TPU does not compute: {either}set "
            "JAX_PLATFORMS=cpu"
        )
