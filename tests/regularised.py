"""Objectives in plain NumPy, with their slopes, and their minima.

Points are vectors of W (K, d), H (K, n, d) and, with a bias, b (K,). A left-out sample has
weight 0.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize


class Model(NamedTuple):
    """An objective of K classes, n samples a class and d dimensions."""

    shape: tuple  # (K, n, d)
    loss: str = "cross_entropy"
    smoothing: float = 0.0
    gamma: float = 0.0
    decay: tuple = (0.0, 0.0)
    ball: tuple | None = None
    bias: float | None = None
    weights: np.ndarray | None = None

    def split(self, z):
        K, n, d = self.shape
        W, H = z[: K * d].reshape(K, d), z[K * d : K * d + K * n * d].reshape(K * n, d)
        return W, H, z[K * d + K * n * d :] if self.bias is not None else np.zeros(K)

    def omega(self):
        K, n, _ = self.shape
        return np.ones(K * n) if self.weights is None else self.weights.ravel()

    def targets(self):
        K, n, _ = self.shape
        one_hot = np.eye(K)[np.repeat(np.arange(K), n)]
        return (1 - self.smoothing) * one_hot + self.smoothing / K

    def loss_and_slopes(self, logits):
        """Sum of losses, and G (N, K)."""
        T, omega = self.targets(), self.omega()
        if self.loss == "squared_error":
            return omega @ np.sum((logits - T) ** 2, 1) / 2, omega[:, None] * (logits - T)
        log_p = logits - logits.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        p = np.exp(log_p)
        losses, slopes = -np.sum(T * log_p, 1), p - T
        if self.loss == "focal":
            own, rest = np.sum(T * p, 1), np.sum((1 - T) * p, 1)
            factor = rest**self.gamma + self.gamma * own * losses * rest ** (self.gamma - 1)
            losses, slopes = rest**self.gamma * losses, factor[:, None] * slopes
        return omega @ losses, omega[:, None] * slopes

    def value_and_grad(self, z):
        W, H, b = self.split(z)
        loss, G = self.loss_and_slopes(H @ W.T + b)
        value = loss + self.decay[0] / 2 * np.sum(W**2) + self.decay[1] / 2 * np.sum(H**2)
        dW, dH = G.T @ H + self.decay[0] * W, G @ W + self.decay[1] * H
        parts = [dW.ravel(), dH.ravel()]
        if self.bias is not None:
            value += self.bias / 2 * np.sum(b**2)
            parts.append(G.sum(0) + self.bias * b)
        return value, np.concatenate(parts)

    def on_boundary(self, z):
        """The loss at norms a, b, and its gradient in the free variables."""
        W, H, b = self.split(z)
        norms = np.linalg.norm(W), np.linalg.norm(H)
        scales = [a**0.5 / r for a, r in zip(self.ball, norms, strict=True)]
        on = np.concatenate([scales[0] * W.ravel(), scales[1] * H.ravel(), b[: self.extra]])
        value, slope = self.value_and_grad(on)
        dW, dH, db = self.split(slope)
        dW = scales[0] * (dW - np.sum(dW * W) / norms[0] ** 2 * W)
        dH = scales[1] * (dH - np.sum(dH * H) / norms[1] ** 2 * H)
        return value, np.concatenate([dW.ravel(), dH.ravel(), db[: self.extra]])

    @property
    def extra(self):
        return 0 if self.bias is None else self.shape[0]

    def random(self, seed, scale=1.0):
        K, n, d = self.shape
        rng = np.random.default_rng(seed)
        return scale * rng.normal(size=K * d + K * n * d + self.extra)

    def minimise(self, starts):
        """Return the least value that conjugate gradients find, and its point."""
        fn = self.value_and_grad if self.ball is None else self.on_boundary
        runs = [descend(fn, self.random(seed, 0.5), gtol=1e-9) for seed in range(starts)]
        best = min(runs, key=lambda run: run.fun)
        return best.fun, best.x


def descend(fn, z, gtol):
    """Minimise `fn`, which returns a value and its gradient, from z.

    The L-BFGS of SciPy wakes the threads of BLAS at every step, which takes twenty times
    as long.
    """
    options = {"maxiter": 1000, "gtol": gtol}
    return minimize(fn, z, jac=True, method="CG", options=options)
