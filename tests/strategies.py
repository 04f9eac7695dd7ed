"""Random inputs that several test modules draw: hypothesis strategies and arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import settings
from hypothesis import strategies as st

import ncjax

# A campaign (CONTRIBUTING.md) draws from more shapes than the default profile.
WIDE = settings.default.max_examples > 25

seeds = st.integers(0, 2**31)
floats = st.sampled_from([np.float32, np.float64])

# A few shapes (K, n, d), each compiled once: K > d, K < d, two classes, one sample.
sizes = st.sampled_from([(2, 1, 1), (3, 2, 7), (6, 1, 4), (5, 4, 5)])


def random_params(seed, num_classes, per_class, dim, scale, dtype=np.float64):
    rng = np.random.default_rng(seed)
    W = scale * rng.normal(size=(num_classes, dim))
    H = scale * rng.normal(size=(num_classes, per_class, dim))
    return ncjax.Params(jnp.asarray(W, dtype), jnp.asarray(H, dtype))


def separating(seed, num_classes=3, per_class=2, dim=4):
    """Draw a point with positive margins: collapse plus noise."""
    noise = random_params(seed, num_classes, per_class, dim, 0.15)
    collapse = ncjax.block_saddle(1, num_classes, per_class, dim)
    return jax.tree.map(jnp.add, collapse, noise)


def random_data(seed, num_classes, dim, samples, scale=1.0, spread=0.5):
    """Draw clusters of unequal sizes, a classifier near their means, and other clusters."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.arange(num_classes), rng.integers(0, num_classes, samples - num_classes) ** 2]
    )
    labels = rng.permutation(labels % num_classes)
    centres = rng.normal(size=(num_classes, dim))
    features = scale * (centres[labels] + spread * rng.normal(size=(samples, dim)))
    return oracles.Data(
        features=features,
        labels=labels,
        W=centres + rng.normal(size=centres.shape),
        b=rng.normal(size=num_classes),
        ood_features=rng.normal(size=(12, dim)) + 1,
        ood_labels=np.arange(12) % 4 * 2,
    )


RANDOM = {
    "wide": random_data(1, num_classes=5, dim=9, samples=60),
    "K=2, N<d": random_data(2, num_classes=2, dim=20, samples=12, scale=30.0),
    "d<K-1": random_data(3, num_classes=6, dim=3, samples=50),
}
