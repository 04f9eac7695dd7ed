"""Random inputs that several test modules draw: hypothesis strategies and arrays."""

from typing import NamedTuple

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


def sine_params(dtype=np.float64, num_classes=4, per_class=3):
    """The start of the reference run: K = 4, n = 3, d = 6."""
    classes, samples = np.arange(num_classes), np.arange(per_class)
    k, j = classes[:, None], np.arange(6)[None]
    W = 0.3 * np.sin(1 + 3 * k + 7 * j)
    k, i, j = classes[:, None, None], samples[None, :, None], np.arange(6)
    H = 0.3 * np.cos(2 + 5 * k + 11 * i + 13 * j)
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


# Data as people bring them: (K, d, N), more classes than dimensions, two classes, d > K.
BROUGHT = ((6, 3, 20), (2, 5, 12), *(((4, 9, 16), (7, 2, 30)) if WIDE else ()))
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
# The largest exponent of two of a scale, and an offset that leaves digits to differences.
RANGES = {
    "float16": (5, 64.0),
    "bfloat16": (100, 16.0),
    "float32": (100, 1e4),
    "float64": (900, 1e8),
}


class Brought(NamedTuple):
    """Features of some dtype, scale and offset, with labels of some integer dtype."""

    given: oracles.Data
    exact: oracles.Data  # the same numbers in float64, features and b divided by the scale
    near: oracles.Data  # `exact` with the offset taken from the features and added to b
    scale: float
    offset: float

    @property
    def rounding(self):
        """One rounding of the dtype of the computation."""
        wide = self.given.features.dtype == np.float64
        return float(np.finfo(np.float64 if wide else np.float32).eps)


@st.composite
def brought(draw, absent=False, widest=None):
    """Draw clusters. Classes of one sample are common; some are absent if asked for.

    `widest` bounds the exponent of the scale.
    """
    num_classes, dim, samples = draw(st.sampled_from(BROUGHT))
    dtype = draw(st.sampled_from(sorted(RANGES)))
    largest, far = RANGES[dtype]
    exponent = draw(st.integers(-largest, largest))
    if widest is not None:
        exponent = max(-widest, min(widest, exponent))
    scale, offset = 2.0**exponent, draw(st.sampled_from([0.0, far]))
    rng = np.random.default_rng(draw(seeds))
    classes = rng.permutation(num_classes)
    if absent:
        classes = classes[: rng.integers(2, num_classes + 1)]
    rest = rng.integers(0, len(classes), samples - len(classes)) ** 2 % len(classes)
    labels = rng.permutation(np.concatenate([classes, classes[rest]]))
    centres = 4 * rng.normal(size=(num_classes, dim))
    features = centres[labels] + rng.normal(size=(samples, dim)) + offset
    W, b = rng.normal(size=centres.shape), rng.normal(size=num_classes)
    features, W, b = (x.astype(jnp.dtype(dtype)) for x in (features, W, b))
    given = oracles.Data(
        features=(features.astype(float) * scale).astype(features.dtype),
        labels=labels.astype(draw(st.sampled_from(INTEGERS))),
        W=W,
        b=(b.astype(float) * scale).astype(b.dtype),
    )
    # What was given counts: half precision rounds numbers near its smallest.
    exact = oracles.Data(
        given.features.astype(float) / scale, labels, W.astype(float), given.b / scale
    )
    near = exact._replace(
        features=exact.features - offset, b=exact.b + offset * exact.W.sum(axis=1)
    )
    return Brought(given, exact, near, scale, offset)
