"""Critical directions of the flow with a closed form of their curvature."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax

# (m, b), in the order of the number of classes K = m b.
_BLOCKS = (
    *((1, 2), (1, 4), (2, 2), (3, 2), (2, 3), (4, 2), (3, 3), (5, 2), (2, 5)),
    *((1, 12), (6, 2), (4, 3), (3, 4), (2, 6)),
)


class Block(NamedTuple):
    """A member of the block family, `ncjax.block_saddle`."""

    num_blocks: int  # m
    block_size: int  # b
    per_class: int  # n
    dim: int  # d

    @property
    def num_classes(self) -> int:
        """K = m b."""
        return self.num_blocks * self.block_size

    @property
    def sigma_max(self) -> float:
        """K / (K - b) for a saddle, 1 for collapse."""
        if self.num_blocks == 1:
            return 1.0
        return self.num_classes / (self.num_classes - self.block_size)

    def eigenvalue(self, scale: float = math.inf) -> float:
        r"""Return the least eigenvalue of the Riemannian Hessian of log L; 0 at collapse.

        At `params(scale)` with c the scale it is

        $$-\frac{b\,(\pi_o - \pi_w)}{K \sqrt n\, \ell}, \quad \pi_w = e^{-c^2 b/(b-1)}/S,
        \quad \pi_o = e^{-c^2}/S, \quad \ell = \log S,$$

        $S = 1 + (b-1) e^{-c^2 b/(b-1)} + (K-b) e^{-c^2}$. Here $\pi_w$ and $\pi_o$ are the
        softmax weights within a block and across; $(\pi_o - \pi_w)/\ell$ tends to
        $1/(K-b)$ as c grows.
        """
        if self.num_blocks == 1:
            return 0.0
        size, others = self.block_size, self.num_classes - self.block_size
        share = 1 / others
        if scale**2 < 300:  # above, the limit is exact to rounding
            within = math.exp(-(scale**2) * size / (size - 1))
            across = math.exp(-(scale**2))
            rest = (size - 1) * within + others * across
            share = (across - within) / (1 + rest) / math.log1p(rest)
        return -size * share / (self.num_classes * math.sqrt(self.per_class))

    @property
    def multiplicity(self) -> int:
        """(m - 1)(d - K + m), the multiplicity of that eigenvalue; 0 if d = K - m."""
        return (self.num_blocks - 1) * (self.dim - self.num_classes + self.num_blocks)

    @property
    def escape_exponent(self) -> float:
        """The power p of the growth (log t)^p of the unstable part of Z/|Z|."""
        return (self.sigma_max - 1) / 2

    def params(self, scale: float) -> ncjax.Params:
        """Return the point: `scale` times `ncjax.block_saddle`."""
        return jax.tree.map(lambda leaf: scale * leaf, ncjax.block_saddle(*self))


def family(max_classes: int) -> list[Block]:
    """Return blocks of all sizes with K up to `max_classes`, at several n and d."""
    return [
        Block(m, b, n, dim)
        for m, b in _BLOCKS
        if m * b <= max_classes
        for n, dim in _settings(m, b)
    ]


def _settings(num_blocks: int, block_size: int) -> list[tuple[int, int]]:
    """Return pairs (n, d): d equal to K, larger, and as small as the blocks allow."""
    num_classes = num_blocks * block_size
    if num_classes <= 6:
        least = max(num_blocks * (block_size - 1), 1)
        return [(1, num_classes), (3, num_classes + 2), (2, least)]
    return [(2, num_classes)]


class Escape(NamedTuple):
    """Flows that leave a saddle."""

    log_times: np.ndarray  # (T,)
    unstable: np.ndarray  # (S, T)  norm of the unstable part of Z/|Z|


def escape(
    block: Block,
    log_times: np.ndarray,
    *,
    distance: float,
    seeds: int,
    key: jax.Array,
    scale: float = 1.0,
) -> Escape:
    """Flow from points near `block`, and record their unstable part.

    Args:
      block: a saddle.
      log_times: (T,) natural logarithms of the times measured.
      distance: relative size of the unstable part of the start.
      seeds: S, number of random directions in the unstable eigenspace.
      key: PRNG key of these directions.
      scale: norm of the start relative to `ncjax.block_saddle`.
    """
    unstable = unstable_space(block)
    saddle = block.params(scale)
    coefficients = jax.random.normal(key, (seeds, block.multiplicity))
    coefficients /= jnp.linalg.norm(coefficients, axis=1, keepdims=True)
    size = distance * jnp.sqrt(ncjax.squared_norm(saddle))

    def one(weights):
        start = jax.tree.map(
            lambda z, u: z + size * jnp.tensordot(weights, u, 1), saddle, unstable
        )
        return ncjax.gradient_flow(
            start, log_times, record=_unstable_norm(unstable), rtol=1e-10, atol=1e-12
        ).recorded

    return Escape(log_times, np.asarray(jax.jit(jax.vmap(one))(coefficients)))


def relative_loss(params: ncjax.Params):
    """Return L over a constant copy of L.

    Its plain Hessian is the Hessian of L divided by L.
    """
    log_loss = ncjax.log_cross_entropy(params)
    return jnp.exp(log_loss - jax.lax.stop_gradient(log_loss))


def unstable_space(block: Block) -> ncjax.Params:
    """Return an orthonormal basis of the unstable eigenspace, with a leading axis."""
    far = block.params(30.0)
    return ncjax.hessian_eig(
        ncjax.log_cross_entropy, far, k=block.multiplicity, sphere=True
    ).eigenvectors


def _unstable_norm(basis: ncjax.Params):
    """Return a function of the state: the norm of the projection of Z/|Z| on `basis`."""

    def norm(state):
        products = [jnp.tensordot(u, z, z.ndim) for u, z in zip(basis, state, strict=True)]
        return jnp.linalg.norm(sum(products)) / jnp.sqrt(ncjax.squared_norm(state))

    return norm
