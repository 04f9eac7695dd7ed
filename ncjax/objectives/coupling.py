"""Eigenvalues of the small blocks of a Hessian that couple W and H, with all digits."""

import math

import numpy as np


def pair(of_W: float, of_H: float, low: float, high: float) -> tuple[float, float]:
    r"""Return both eigenvalues of a symmetric block, in ascending order.

    $$\begin{pmatrix} x & m \\ m & y \end{pmatrix}$$

    The small one is the determinant over the large one, because their difference would
    lose its digits where x and y differ by a large factor.

    Args:
      of_W: $x \ge 0$.
      of_H: $y \ge 0$, and x + y > 0.
      low: $\sqrt{x y} - m$.
      high: $\sqrt{x y} + m$.
    """
    large = (of_W + of_H + math.hypot(of_W - of_H, high - low)) / 2
    return low * high / large, large


def triple(mu: float, a: float, b: float, c: float, r2: float) -> np.ndarray:
    r"""Return the eigenvalues (3,) of the block of one class against the others.

    $$D \begin{pmatrix} a + \mu & a - \mu & b \\ a - \mu & a + \mu & b \\ b & b & c
    \end{pmatrix} D, \qquad D = \operatorname{diag}(r, r^{-1}, r^{-1})$$

    They are squares of the singular values of a factor, which keeps the small ones.
    """
    factor = np.array(
        [
            [math.sqrt(mu), -math.sqrt(mu), 0],
            [math.sqrt(a), math.sqrt(a), b / math.sqrt(a)],
            [0, 0, math.sqrt(c - b**2 / a)],
        ]
    )
    r = math.sqrt(r2)
    return np.linalg.svd(factor * (r, 1 / r, 1 / r), compute_uv=False) ** 2
