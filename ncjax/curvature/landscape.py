"""Hessian eigenpairs of a loss, also on the sphere, and densities of the spectrum."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ncjax import sizes
from ncjax.arrays import as_array
from ncjax.checks import (
    check_choice,
    check_count,
    check_installed,
    check_integer,
    check_key,
    check_positive,
    concrete,
)
from ncjax.curvature.hessian import Flat, tangent_operator
from ncjax.curvature.inputs import check_floating, check_fn, hashable
from ncjax.curvature.lanczos import EigenPairs, eigh_ends, gauss_quadrature, rayleigh
from ncjax.curvature.meter import meter
from ncjax.numerics import on_device
from ncjax.types import Array

# Up to this dimension method="auto" forms the Hessian and calls LAPACK or cuSOLVER.
DENSE_LIMIT = 1000

# Products are counted in int32.
_MOST = 2**31 - 1

# Columns of a dense Hessian that are computed at once.
_DENSE_BATCH = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HessianEig:
    """Eigenpairs of a Hessian, and how they were computed."""

    eigenvalues: Array  # (k,)  ascending
    eigenvectors: Any  # (k, ...) leaves in the structure of `params`, orthonormal
    residuals: Array  # (k,)  |H v - λ v|, from a separate Hessian-vector product
    converged: Array  # (k,)  residual at most tol * |H|, and no eigenpair missing
    num_hvps: Array  # ()    Hessian-vector products (int32)
    method: str = field(metadata={"static": True})  # "dense" or "lanczos"


class SpectralDensity(NamedTuple):
    """Density of eigenvalues, and the quadrature behind it."""

    grid: Array  # (T,)  eigenvalues
    density: Array  # (T,)  integrates to 1 over the real line
    nodes: Array  # (P, m)  tr f(H) / D is estimated by sum(weights * f(nodes))
    weights: Array  # (P, m)  not negative, sum to 1


def hessian_eig(
    fn: Callable,
    params,
    *,
    batches=None,
    k: int | None = None,
    which: str = "smallest",
    sphere: bool = False,
    method: str = "auto",
    key: Array | None = None,
    tol: float | None = None,
    num_vectors: int | None = None,
    max_hvps: int = 20_000,
    progress: bool = False,
) -> HessianEig:
    r"""Return eigenvalues and eigenvectors of the Hessian of a scalar function of a pytree.

    $$\nabla^2 f(Z)\, v = \lambda v, \qquad \text{or} \quad \Bigl( P\, \nabla^2 f\, P
    - \tfrac{\langle \nabla f, Z \rangle}{|Z|^2} P \Bigr) v = \lambda v, \quad
    P = I - \tfrac{Z Z^\top}{|Z|^2}$$

    The second equation, for `sphere=True`, is the Riemannian Hessian on the sphere
    $|Z|$ = const; v lies in its tangent space, of dimension D - 1. Up to `DENSE_LIMIT` =
    1000 parameters the Hessian is formed and decomposed. Above, Lanczos runs with full
    reorthogonalisation and thick restarts. If k > 1, a fresh random start must then find no
    further eigenpair, so multiple eigenvalues appear with all their copies.

    Works under `jax.jit`, and with `params` or `batches` sharded over devices. It compiles
    once per function object: for other params pass the same `fn`. A callable that cannot
    be hashed is compiled at each call.

    Args:
      fn: scalar function of `params`, or of `params` and a batch if `batches` is given.
        Arrays that it closes over become constants of the program, so pass large data as
        `batches`.
      params: any pytree of floating arrays, Z.
      batches: pytree of arrays with a leading axis of C batches; f is then
        `sum_c fn(params, batches[c])`, one batch at a time in bounded memory.
      k: number of eigenpairs, at each end for `which="both"`. If None, 1, or all for
        `which="all"`.
      which: "smallest", "largest", "both" (2k in all, at most D) or "all" (dense).
      sphere: use the Riemannian Hessian on the sphere. For the layer-peeled model pass
        `ncjax.log_cross_entropy`, which does not underflow: at a critical direction, where
        the gradient is radial, its Hessian on the sphere is the Hessian of the loss divided
        by the loss.
      method: "dense", "lanczos", or "auto" to choose by size.
      key: PRNG key of the start vectors, `jax.random.key(0)` if None.
      tol: a pair has converged once its residual is below `tol` times the current
        estimate of the largest |eigenvalue|. If None, `eps**(2/3)` of the coarsest dtype in
        `params`: 4e-11 in float64, 2e-5 in float32. The error of an eigenvalue is at most
        its squared residual divided by its distance to the next eigenvalue.
      num_vectors: size of the Lanczos basis, `max(2 k + 10, 20)` if None, where k counts
        both ends. Lanczos keeps at most twice `num_vectors * D` numbers.
      max_hvps: after this many products Lanczos begins no new restart.
      progress: show a tqdm line with the number of Lanczos products and the largest
        residual, which must fall below `tol`. Needs `pip install 'ncjax[experiments]'`.

    Returns:
      `HessianEig`. Eigenvectors have norm 1 over all leaves together, and the dtypes of
      `params`. Under jit, values that are not finite become NaN, and `converged` False.

    Raises:
      ValueError: params are not floating and finite, fn is not scalar, Z = 0 with
        `sphere`, k or another argument is out of range, or (outside jit) a
        Hessian-vector product holds NaN or infinity.
      ModuleNotFoundError: `progress` is set and tqdm is not installed.

    Source: the Riemannian Hessian sharpens Theorem 3.3 of Ji et al. (ICLR 2022): at a
    KKT direction its least eigenvalue separates saddles from minimisers. Lanczos with
    thick restarts: Wu and Simon (SIAM J. Matrix Anal. Appl. 22, 2000).

    >>> import ncjax
    >>> saddle = ncjax.block_saddle(num_blocks=2, block_size=2, per_class=1, dim=4)
    >>> far = ncjax.Params(30 * saddle.W, 30 * saddle.H)
    >>> eig = ncjax.hessian_eig(ncjax.log_cross_entropy, far, k=2, sphere=True)
    >>> [round(float(value), 3) for value in eig.eigenvalues]
    [-0.25, -0.25]
    """
    if progress:
        check_installed("experiments", "tqdm")
    params = check_floating(params, sphere)
    batches = check_fn(fn, params, batches)
    flat = Flat(params)
    dim = _dimension(flat, sphere)
    count = _check_count(k, which, dim, sphere)
    tol = flat.eps ** (2 / 3) if tol is None else tol
    check_positive("tol", tol)
    check_count("max_hvps", max_hvps, least=1)
    if key is not None:
        check_key("key", key)
    num_vectors = _check_num_vectors(num_vectors, count, dim)
    method = _choose_method(method, which, dim, num_vectors)
    eig = _solve(
        params,
        batches,
        key,
        on_device(float(tol), flat.dtype),
        on_device(min(max_hvps, _MOST), np.int32),
        fn=hashable(fn),
        count=count,
        which=which,
        sphere=sphere,
        method=method,
        num_vectors=num_vectors,
        progress=progress,
    )
    _check_finite_result("eigenvalues", eig.eigenvalues)
    return eig


def spectral_density(
    fn: Callable,
    params,
    *,
    batches=None,
    sphere: bool = False,
    grid=None,
    num_points: int = 1024,
    num_probes: int = 8,
    num_steps: int = 64,
    width: float | None = None,
    key: Array | None = None,
) -> SpectralDensity:
    r"""Estimate the density of Hessian eigenvalues by stochastic Lanczos quadrature.

    $$\rho(x) = \frac1D \sum_i \delta(x - \lambda_i) \approx \frac1P \sum_{p,s}
    w_{ps}\, \mathcal N(x;\, x_{ps}, \text{width}^2)$$

    The P probes $u_p$ are random unit vectors. $\sum_s w_{ps} f(x_{ps})$ is Gauss
    quadrature of $u_p^\top f(H) u_p$, exact for polynomials f up to degree `2 m - 1`. So
    moments up to this degree have only the Monte Carlo error of a mean over P probes.

    Args:
      fn: scalar function of `params`, or of `params` and a batch if `batches` is given.
      params: any pytree of floating arrays.
      batches: as in `hessian_eig`.
      sphere: Riemannian Hessian on the sphere, as in `hessian_eig`.
      grid: (T,) eigenvalues at which the density is evaluated. If None, `num_points` evenly
        spaced ones, from 5 widths below the lowest node to 5 above the highest.
      num_points: T if `grid` is None, at least 2.
      num_probes: P, at least 1.
      num_steps: m, Lanczos steps per probe, at most D. The basis holds m * D numbers.
      width: standard deviation of the Gaussians; 1 % of the range of the nodes if None.
      key: PRNG key of the probes, `jax.random.key(0)` if None.

    Returns:
      `SpectralDensity`.

    Raises:
      ValueError: as `hessian_eig`, or `grid` or `width` is out of range.

    Source: Ubaru, Chen and Saad (SIAM J. Matrix Anal. Appl. 38, 2017); applied to
    networks by Papyan (JMLR 21, 2020).

    >>> import jax.numpy as jnp, ncjax
    >>> density = ncjax.spectral_density(lambda x: jnp.sum(x**2), jnp.ones(5))
    >>> round(float(jnp.sum(density.weights * density.nodes)), 4)  # trace of 2 I over 5
    2.0
    """
    params = check_floating(params, sphere)
    batches = check_fn(fn, params, batches)
    flat = Flat(params)
    dim = _dimension(flat, sphere)
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps)):
        check_integer(name, value, least=1)
    check_integer("num_points", num_points, least=2)
    if key is not None:
        check_key("key", key)
    if width is not None:
        check_positive("width", width, flat.dtype)
        width = float(width)
    if grid is not None:
        grid = as_array("grid", grid).astype(flat.dtype)
        if grid.ndim != 1:
            raise ValueError(f"grid must be a vector (T,), got shape {grid.shape}")
    density = _density(
        params,
        batches,
        key,
        grid,
        fn=hashable(fn),
        sphere=sphere,
        num_points=num_points,
        num_probes=num_probes,
        num_steps=min(num_steps, dim),
        width=width,
    )
    _check_finite_result("nodes", density.nodes)
    return density


_STATIC = ("fn", "count", "which", "sphere", "method", "num_vectors", "progress")


@partial(jax.jit, static_argnames=_STATIC)
def _solve(
    params,
    batches,
    key,
    tol,
    max_hvps,
    *,
    fn,
    count,
    which,
    sphere,
    method,
    num_vectors,
    progress,
) -> HessianEig:
    flat = Flat(params)
    matvec, embed, dim = tangent_operator(fn, params, batches, sphere)
    if method == "dense":
        pairs = _eigh_dense(matvec, dim, flat.dtype, count, which, tol)
    else:
        pairs = eigh_ends(
            matvec,
            dim,
            _start_key(key),
            count=count,
            which=which,
            tol=tol,
            eps=flat.eps,
            num_vectors=num_vectors,
            max_matvecs=max_hvps,
            dtype=flat.dtype,
            report=meter if progress else None,
        )
    return HessianEig(
        eigenvalues=pairs.values,
        eigenvectors=jax.vmap(lambda v: flat.unravel(embed(v)))(pairs.vectors),
        residuals=pairs.residuals,
        converged=pairs.converged,
        num_hvps=pairs.num_matvecs,
        method=method,
    )


def _eigh_dense(matvec, dim: int, dtype, count: int, which: str, tol) -> EigenPairs:
    """Form the matrix and return eigenpairs at the ends of its spectrum."""
    size = min(_DENSE_BATCH, dim)
    identity = jnp.eye(-(-dim // size) * size, dim, dtype=dtype)
    columns = jax.lax.map(jax.vmap(matvec), identity.reshape(-1, size, dim))
    matrix = columns.reshape(-1, dim)[:dim]
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    low = {"smallest": count, "largest": 0, "both": (count + 1) // 2, "all": count}[which]
    chosen = jnp.concatenate([jnp.arange(low), jnp.arange(dim - (count - low), dim)])
    norm = jnp.max(jnp.abs(values))
    pairs = rayleigh(matvec, vectors.T[chosen], tol * norm)
    return pairs._replace(num_matvecs=pairs.num_matvecs + dim)


@partial(
    jax.jit,
    static_argnames=("fn", "sphere", "num_points", "num_probes", "num_steps", "width"),
)
def _density(
    params, batches, key, grid, *, fn, sphere, num_points, num_probes, num_steps, width
) -> SpectralDensity:
    flat = Flat(params)
    matvec, _, dim = tangent_operator(fn, params, batches, sphere)

    def probe(key):
        return gauss_quadrature(
            matvec, dim, key, num_steps=num_steps, eps=flat.eps, dtype=flat.dtype
        )

    nodes, weights = jax.lax.map(probe, jax.random.split(_start_key(key), num_probes))
    weights = weights / num_probes
    low, high = jnp.min(nodes), jnp.max(nodes)
    if width is None:
        # If all nodes coincide, a little more than their rounding error.
        size = jnp.maximum(jnp.abs(low), jnp.abs(high))
        spread = jnp.maximum((high - low) / 100, math.sqrt(flat.eps) * size)
        spread = jnp.where(spread > 0, spread, 0.01)
    else:
        spread = jnp.asarray(width, flat.dtype)
    if grid is None:
        grid = jnp.linspace(low - 5 * spread, high + 5 * spread, num_points)
    return SpectralDensity(
        grid=grid,
        density=_mixture(grid, nodes, weights, spread),
        nodes=nodes,
        weights=weights,
    )


def _mixture(grid: Array, nodes: Array, weights: Array, spread: Array) -> Array:
    """Return the density at `grid` (T,) of Gaussians about `nodes`, with `weights`."""

    def at(x):
        kernel = jnp.exp(-(((x - nodes) / spread) ** 2) / 2)
        return jnp.sum(weights * kernel) / (spread * math.sqrt(2 * math.pi))

    def in_groups(grid):
        size = max(1, sizes.CHUNK_BYTES // 4 // nodes.size)
        return jax.lax.map(at, grid, batch_size=size)

    return jax.lax.platform_dependent(
        grid, cpu=lambda grid: jax.lax.map(at, grid), default=in_groups
    )


def _start_key(key: Array | None) -> Array:
    """Return the PRNG key, `jax.random.key(0)` if None.

    Compiled programs call this, so that no transfer is implicit.
    """
    return jax.random.key(0) if key is None else key


def _dimension(flat: Flat, sphere: bool) -> int:
    """Return the dimension of the parameters, or of the tangent space of the sphere."""
    dim = flat.dim - 1 if sphere else flat.dim
    if not dim:
        raise ValueError("sphere=True needs at least 2 parameters, got 1")
    return dim


def _check_count(k, which: str, dim: int, sphere: bool) -> int:
    """Return the number of eigenpairs that `k` and `which` request."""
    check_choice("which", which, ("smallest", "largest", "both", "all"))
    k = (dim if which == "all" else 1) if k is None else k
    check_integer("k", k, least=1)
    space = "the tangent space" if sphere else "params"
    if k > dim or (which == "all" and k != dim):
        expected = f"{dim} or None for which='all'" if which == "all" else f"at most {dim}"
        raise ValueError(f"k must be {expected}, the dimension of {space}, got {k}")
    return min(2 * k, dim) if which == "both" else int(k)


def _check_num_vectors(num_vectors, count: int, dim: int) -> int:
    """Return the size of the Lanczos basis."""
    least = min(count + 4, dim)
    if num_vectors is None:
        return min(max(2 * count + 10, 20), dim)
    check_integer("num_vectors", num_vectors, least=1)
    if num_vectors < least:
        raise ValueError(
            f"num_vectors must be at least {least} for {count} eigenpairs, "
            f"got {num_vectors}"
        )
    return min(num_vectors, dim)


def _choose_method(method: str, which: str, dim: int, num_vectors: int) -> str:
    """Return `method`, with "auto" replaced by the method for this size."""
    check_choice("method", method, ("auto", "dense", "lanczos"))
    if method == "lanczos" and which == "all":
        raise ValueError("which='all' needs method='dense' or 'auto', got 'lanczos'")
    small = dim <= DENSE_LIMIT or num_vectors == dim or which == "all"
    if method == "auto":
        return "dense" if small else "lanczos"
    return method


def _check_finite_result(name: str, values: Array) -> None:
    """Raise ValueError if concrete `values` hold NaN or infinity."""
    known = concrete(values)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(
            f"Hessian-vector products of fn must be finite, got {name} that are not: "
            "check that fn is twice differentiable at params"
        )
