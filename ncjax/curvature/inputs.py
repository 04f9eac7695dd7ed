"""Check the function, parameters and batches that a caller passes."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ncjax.arrays import as_array
from ncjax.checks import check_computes, check_finite, concrete


def hashable(fn: Callable) -> Callable:
    """Return `fn`, wrapped if it has no hash (a module that holds arrays)."""
    try:
        hash(fn)
    except TypeError:
        return lambda *args: fn(*args)
    return fn


def check_floating(params, sphere: bool):
    """Return `params` as JAX arrays; raise ValueError unless floating and finite."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in named]
    leaves = [as_array(name, leaf) for name, (_, leaf) in zip(names, named, strict=True)]
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("params must hold at least one number, got an empty pytree")
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be real and floating, got {leaf.dtype}: cast it, or "
                "leave it out of params and let fn close over it"
            )
        check_computes(name, leaf)
        check_finite(name, leaf)
    values = [concrete(leaf) for leaf in leaves] if sphere else []
    if sphere and all(value is not None and not value.any() for value in values):
        raise ValueError(
            "sphere=True needs params away from the origin, got all zeros: pass "
            "sphere=False for the plain Hessian there"
        )
    return jax.tree.unflatten(treedef, leaves)


def check_fn(fn, params, batches):
    """Return `batches` as JAX arrays; raise ValueError unless `fn` of one is a scalar."""
    if batches is None:
        value = jax.eval_shape(fn, params)
    else:
        batches = jax.tree.map(partial(as_array, "batches"), batches)
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
        f"fn must return one real floating scalar, got {given}: reduce it, or "
        "return the loss alone"
    )
