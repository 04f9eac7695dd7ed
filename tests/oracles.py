"""Independent oracles."""

import numpy as np

# --------------------------------------------------------------------------
# layer-peeled model: W (K, d), H (K, n, d)
# --------------------------------------------------------------------------


def margins(W, H):
    """m_kij = (w_k - w_j)·h_ki, (K, n, K), +inf where j = k."""
    K, n, _ = H.shape
    m = np.full((K, n, K), np.inf, dtype=H.dtype)
    for k in range(K):
        for i in range(n):
            for j in range(K):
                if j != k:
                    m[k, i, j] = (W[k] - W[j]) @ H[k, i]
    return m


def cross_entropy(W, H):
    """Sum over samples of log(1 + sum_{j != k} exp(-m_kij))."""
    return np.sum(np.log1p(np.sum(np.exp(-margins(W, H)), axis=-1)))


def log_softplus(a):
    """log log(1 + e^a) and its derivative in a, in extended precision."""
    a = np.asarray(a, np.longdouble)
    softplus = np.where(a > 0, a, 0) + np.log1p(np.exp(-np.abs(a)))
    small = a < -60  # the rest of the series is below e^-120
    value = np.where(
        small, a - np.exp(np.minimum(a, 0)) / 2, np.log(np.where(small, 1, softplus))
    )
    log_sigmoid = np.where(a < 0, a, 0) - np.log1p(np.exp(-np.abs(a)))
    return value, np.exp(log_sigmoid - value)


def log_cross_entropy_and_gradient(W, H):
    """log L and its gradient (in W, in H), by loops in extended precision."""
    W, H = (np.asarray(leaf, np.longdouble) for leaf in (W, H))
    K, n, _ = H.shape
    m = margins(W, H)
    least = m.min(axis=-1)
    exponentials = np.exp(least[..., None] - m)  # 0 where j = k
    a = np.log(exponentials.sum(axis=-1)) - least
    log_loss, slope = log_softplus(a)
    total = log_loss.max() + np.log(np.sum(np.exp(log_loss - log_loss.max())))
    gradient_W, gradient_H = np.zeros_like(W), np.zeros_like(H)
    for k in range(K):
        for i in range(n):
            share = np.exp(log_loss[k, i] - total) * slope[k, i]
            weights = share * exponentials[k, i] / exponentials[k, i].sum()
            for j in range(K):
                if j != k:  # d(-m_kij) = (w_j - w_k)·dh + (dw_j - dw_k)·h
                    gradient_H[k, i] += weights[j] * (W[j] - W[k])
                    gradient_W[j] += weights[j] * H[k, i]
                    gradient_W[k] -= weights[j] * H[k, i]
    return total, gradient_W, gradient_H
