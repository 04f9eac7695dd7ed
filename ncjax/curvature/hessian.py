"""Hessian-vector products of a scalar function of a pytree, also on the sphere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ncjax.arrays import as_array
from ncjax.curvature.inputs import check_floating, check_fn
from ncjax.numerics import dot
from ncjax.types import Array


def hvp(fn: Callable, params, vector, *, batches=None, sphere: bool = False):
    r"""Return the Hessian of `fn` times a vector, by forward over reverse differentiation.

    $$H v = \nabla^2 f(Z)\, v, \qquad \text{or with } P = I - \tfrac{Z Z^\top}{|Z|^2}
    \quad H v = P\, \nabla^2 f\, P v - \tfrac{\langle \nabla f, Z \rangle}{|Z|^2}\, P v$$

    The second form, for `sphere=True`, is the Riemannian Hessian: the curvature of f along
    great circles of the sphere $|Z|$ = const. Matrix products inside `fn` run at the
    highest precision unless they name their own.

    Args:
      fn: scalar function of `params`, or of `params` and a batch if `batches` is given.
      params: any pytree of floating arrays, Z.
      vector: pytree like `params`.
      batches: pytree of arrays with a leading axis of C batches; f is then
        `sum_c fn(params, batches[c])`, one batch at a time.
      sphere: use the Riemannian Hessian on the sphere.

    Returns:
      Pytree like `params`.

    Raises:
      ValueError: params are not floating and finite, fn is not scalar, the structure of
        `vector` or `batches` does not fit, or Z = 0 with `sphere`.

    >>> import jax.numpy as jnp, ncjax
    >>> ncjax.hvp(lambda x: jnp.sum(x**3), jnp.ones(2), jnp.array([1.0, 2.0])).tolist()
    [6.0, 12.0]
    """
    params = check_floating(params, sphere)
    vector = jax.tree.map(partial(as_array, "vector"), vector)
    given, expected = jax.tree.map(jnp.shape, vector), jax.tree.map(jnp.shape, params)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (vector, params)]
    if structures[0] != structures[1] or given != expected:
        raise ValueError(
            f"vector must be like params, a pytree of shapes {expected}, got {given}"
        )
    batches = check_fn(fn, params, batches)
    flat = Flat(params)
    return flat.unravel(_hessian(fn, params, batches, sphere)(flat.ravel(vector)))


class Flat:
    """Convert parameters to one vector (D,), in their widest dtype, at least float32."""

    def __init__(self, params):
        leaves, self.treedef = jax.tree.flatten(params)
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.ends = [0]
        for leaf in leaves:
            self.ends.append(self.ends[-1] + leaf.size)
        self.dim = self.ends[-1]
        wide = any(dtype == jnp.float64 for dtype in self.dtypes)
        self.dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
        self.eps = max(float(jnp.finfo(dtype).eps) for dtype in self.dtypes)

    def ravel(self, tree) -> Array:
        """Return a tree with the structure of the parameters as a vector (D,)."""
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([leaf.reshape(-1).astype(self.dtype) for leaf in leaves])

    def unravel(self, vector: Array):
        """Invert `ravel`, in the dtypes of the parameters."""
        parts = [
            vector[start:end].reshape(shape).astype(dtype)
            for start, end, shape, dtype in zip(
                self.ends[:-1], self.ends[1:], self.shapes, self.dtypes, strict=True
            )
        ]
        return jax.tree.unflatten(self.treedef, parts)


def tangent_operator(fn, params, batches, sphere: bool) -> tuple[Callable, Callable, int]:
    """Return the Hessian in orthonormal coordinates, their embedding and their number.

    On the sphere these are coordinates of the tangent space, the vectors orthogonal to Z.
    A Householder reflection maps the first unit vector to the line of Z, and the other
    unit vectors to an orthonormal basis of the tangent space.
    """
    hessian = _hessian(fn, params, batches, sphere)
    flat = Flat(params)
    if not sphere:
        return hessian, lambda v: v, flat.dim
    unit, _ = _direction(flat.ravel(params))
    mirror = unit.at[0].add(jnp.where(unit[0] < 0, -1.0, 1.0))
    mirror = mirror / jnp.linalg.norm(mirror)

    def reflect(v):
        return v - 2 * dot(mirror, v) * mirror

    def embed(v):
        return reflect(jnp.concatenate([jnp.zeros(1, v.dtype), v]))

    return lambda v: reflect(hessian(embed(v)))[1:], embed, flat.dim - 1


def _hessian(fn, params, batches, sphere: bool) -> Callable[[Array], Array]:
    """Return `hvp` as a function of a flat vector (D,)."""
    flat = Flat(params)
    gradient = _gradient(fn, batches)

    def plain(v):
        with jax.default_matmul_precision("highest"):
            return flat.ravel(jax.jvp(gradient, (params,), (flat.unravel(v),))[1])

    if not sphere:
        return plain
    unit, length = _direction(flat.ravel(params))
    with jax.default_matmul_precision("highest"):
        slope = flat.ravel(gradient(params))
    radial = dot(slope, unit) / length

    def project(v):
        return v - dot(unit, v) * unit

    def riemannian(v):
        v = project(v)
        return project(plain(v)) - radial * v

    return riemannian


def _gradient(fn, batches) -> Callable:
    """Return the gradient in `params` as a function, summed over one batch at a time."""
    if batches is None:
        return jax.grad(fn)

    def total(params):
        def add(sums, batch):
            return jax.tree.map(jnp.add, sums, jax.grad(fn)(params, batch)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]

    return total


def _direction(vector: Array) -> tuple[Array, Array]:
    """Return `vector` (D,) divided by its norm, and the norm, without overflow."""
    largest = jnp.max(jnp.abs(vector))
    length = jnp.linalg.norm(vector / largest)
    return vector / largest / length, length * largest
