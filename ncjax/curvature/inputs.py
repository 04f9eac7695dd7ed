"""A function, its parameters and its batches from outside, checked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.checks import check_finite


def hashable(fn: Callable) -> Callable:
    """`fn`, wrapped if it has no hash (a module that holds arrays)."""
    try:
        hash(fn)
    except TypeError:
        return lambda *args: fn(*args)
    return fn


def concrete(array) -> np.ndarray | None:
    """The value of `array`; None where it is not known here, as under `jax.jit`."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return None
    return np.asarray(array)


def check_floating(params, sphere: bool):
    """`params` with JAX arrays as leaves, once floating, finite and not empty."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("params must hold at least one number, got an empty pytree")
    values = [concrete(leaf) for leaf in leaves]
    for (path, _), leaf, value in zip(named, leaves, values, strict=True):
        name = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be real and floating, got {leaf.dtype}: cast it, or close "
                "over what is not to be differentiated"
            )
        if value is not None:
            check_finite(name, leaf)
    if sphere and all(value is not None and not value.any() for value in values):
        raise ValueError(
            "sphere=True needs params away from the origin, got all zeros: pass "
            "sphere=False for the plain Hessian there"
        )
    return jax.tree.unflatten(treedef, leaves)


def check_fn(fn, params, batches):
    """`batches` as JAX arrays, once they fit together and `fn` is scalar on one."""
    if batches is None:
        value = jax.eval_shape(fn, params)
    else:
        batches = jax.tree.map(jnp.asarray, batches)
        shapes = [leaf.shape for leaf in jax.tree.leaves(batches)]
        counts = {shape[0] if shape else 0 for shape in shapes}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "batches must be arrays with one leading axis of at least 1 batch in "
                f"common, got shapes {shapes}"
            )
        value = jax.eval_shape(
            lambda params, batches: fn(params, jax.tree.map(lambda x: x[0], batches)),
            params,
            batches,
        )
    is_array = isinstance(value, jax.ShapeDtypeStruct)
    if is_array and not value.shape and jnp.issubdtype(value.dtype, jnp.floating):
        return batches
    given = f"{value.dtype} of shape {value.shape}" if is_array else type(value).__name__
    raise ValueError(
        f"fn must return one real floating scalar, got {given}: reduce it, or pick the "
        "loss from what it returns"
    )
