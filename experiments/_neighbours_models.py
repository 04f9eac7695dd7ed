"""Small instances of the models in Table 1 of Ji et al. (ICLR 2022), with their optima."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax

ULPM = "ulpm"
SMOOTHING, GAMMA = 0.1, 2.0
_BALANCED, _STEP = "balanced", "STEP"


class Sizes(NamedTuple):
    """Sizes of all models."""

    num_classes: int
    per_class: int
    dim: int
    ratio: int  # n_A / n_B of the STEP counts, n_B = 1
    decay: float  # lambda_W = lambda_H = mu of the models with weight decay

    def counts(self, kind: str) -> tuple[int, ...]:
        """Return the class sizes: all `per_class`, or STEP, large classes first."""
        if kind == _BALANCED:
            return (self.per_class,) * self.num_classes
        large = self.num_classes // 2
        return (self.ratio,) * large + (1,) * (self.num_classes - large)


class Model(NamedTuple):
    """An objective with class sizes."""

    name: str  # of its arrays in the checkpoint
    label: str
    kind: str  # balanced or STEP
    objective: ncjax.Objective
    counts: tuple[int, ...]
    dim: int

    @property
    def weights(self):
        """Weights (K, n), None if all classes have one size."""
        return None if self.kind == _BALANCED else ncjax.sample_weights(self.counts)

    @property
    def regularised(self) -> bool:
        """Whether the objective has a minimiser; the ULPM has a direction only."""
        return self.objective.regularised

    def best(self) -> Any:
        """Return the optimum in closed form: `Minimiser`, or `Separation` of the ULPM."""
        if self.regularised:
            return ncjax.minimiser(self.objective, self.counts, self.dim)
        return ncjax.solve_separation(self.counts, self.dim)

    def scalar(self, params) -> jax.Array:
        """Return the function of which the flow is the gradient flow."""
        if self.objective.ball is not None:
            return self.objective.on_boundary(params, self.weights)
        return self.objective(params, self.weights)

    def starts(self, key: jax.Array, seeds: int, scale: float):
        """Return random starts with a leading axis (seeds,).

        Rows of the normalised model have length 1. A fixed classifier is a simplex ETF.
        """

        def start(key):
            sizes = (len(self.counts), self.counts, self.dim)
            params: Any = ncjax.init_params(key, *sizes, scale, jnp.float64)
            if self.objective.temperature is not None:
                params = jax.tree.map(_unit_rows, params)
            if self.objective.fixed_classifier:
                etf = ncjax.simplex_etf(len(self.counts), self.dim, dtype=jnp.float64)
                params = params._replace(W=etf)
            if self.objective.bias is not None:
                bias = scale * jax.random.normal(key, (len(self.counts),), jnp.float64)
                params = ncjax.BiasedParams(params.W, params.H, bias)
            return params

        return jax.vmap(start)(jax.random.split(key, seeds))

    def least_rate(self) -> float:
        """Return the least positive eigenvalue of the Hessian at the minimiser."""
        best = self.best()
        eig = ncjax.hessian_eig(self.scalar, best.params, which="all")
        values = np.asarray(eig.eigenvalues)
        return float(values[values > 1e-9 * values.max()].min())


def models(sizes: Sizes) -> list[Model]:
    """Return all models, the unregularised one first.

    The ball of the LPM and the temperature are such that the margins of their minimisers
    are the margins of the minimiser with weight decay.
    """
    decay: dict[str, Any] = {"weight_decay": (sizes.decay, sizes.decay)}
    square = {"loss": "squared_error"} | decay
    entries: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
        (ULPM, "ULPM", {}, (_BALANCED, _STEP)),
        ("ufm", "UFM", decay, (_BALANCED, _STEP)),
        ("ufm_bias", "UFM with bias", decay | {"bias": sizes.decay}, (_BALANCED,)),
        ("smoothing", "label smoothing", decay | {"smoothing": SMOOTHING}, (_BALANCED,)),
        ("focal", "focal loss", decay | {"loss": "focal", "gamma": GAMMA}, (_BALANCED,)),
        ("square", "squared error", square, (_BALANCED, _STEP)),
        ("square_bias", "squared error with bias", square | {"bias": 1.0}, (_BALANCED,)),
        ("square_free", "squared error, free bias", square | {"bias": 0.0}, (_STEP,)),
        ("fixed", "fixed ETF", decay | {"fixed_classifier": True}, (_BALANCED, _STEP)),
    ]
    found = []
    for name, label, settings, kinds in entries:
        objective = ncjax.Objective(**settings)
        found += [_model(name, label, kind, objective, sizes) for kind in kinds]
    return found + _bounded(found, sizes)


def _bounded(found: list[Model], sizes: Sizes) -> list[Model]:
    """Return the models with bounded norms whose margins equal the margins of the UFM."""
    bounded = []
    for ufm in (model for model in found if model.name.startswith("ufm-")):
        params = ufm.best().params
        ball = tuple(float(jnp.sum(leaf**2)) for leaf in params)
        objective = ncjax.Objective(ball=ball)  # type: ignore[arg-type]
        bounded.append(_model("lpm", "LPM", ufm.kind, objective, sizes))
    share = (sizes.num_classes - 1) / sizes.num_classes
    margin = next(model for model in found if model.name == "ufm-balanced").best().margin
    objective = ncjax.Objective(temperature=float(margin) * share)
    return [*bounded, _model("normalised", "normalised", _BALANCED, objective, sizes)]


def _model(name, label, kind, objective, sizes: Sizes) -> Model:
    return Model(f"{name}-{kind}", label, kind, objective, sizes.counts(kind), sizes.dim)


def _unit_rows(rows: jax.Array) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def distance_to_optimum(params, best, weights=None) -> jax.Array:
    r"""Return the distance of a direction from the optimal one, up to rotation.

    $$1 - \max_{Q^\top Q = I} \frac{\langle Z, Z^* Q \rangle}{|Z|\,|Z^*|}
    = 1 - \frac{|Z^\top Z^*|_* + \langle b, b^* \rangle}{|Z|\,|Z^*|}$$

    with the rows of W and H as the rows of Z. Samples of weight 0 are left out.
    """
    first, second = (_rows(point, weights) for point in (params, best))
    overlap = jnp.sum(jnp.linalg.svd(first.T @ second, compute_uv=False))
    norms = jnp.sum(first**2), jnp.sum(second**2)
    if isinstance(params, ncjax.BiasedParams):
        overlap = overlap + params.b @ best.b
        norms = norms[0] + params.b @ params.b, norms[1] + best.b @ best.b
    return 1 - overlap / jnp.sqrt(norms[0] * norms[1])


def _rows(params, weights) -> jax.Array:
    """Return the rows of W and H that count, (K + K n, d)."""
    H = params.H
    if weights is not None:
        H = jnp.where(jnp.asarray(weights)[..., None] > 0, H, 0)
    return jnp.concatenate([params.W, H.reshape(-1, H.shape[-1])])
