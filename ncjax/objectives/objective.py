r"""Objectives over the layer-peeled variables: a loss with decay, on a ball, or alone.

A loss is a sum over samples of a function of the logits $z_{kij} = w_j^\top h_{k,i} (+
b_j)$ and of the class k of the sample.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.checks import check_biased_params, check_choice, check_params
from ncjax.numerics import at_unit_scale, einsum, widen
from ncjax.objectives.settings import check_settings
from ncjax.peeled import samples
from ncjax.peeled.kernels import log_sum
from ncjax.peeled.weights import check_weights, weighted, without_left_out
from ncjax.types import Array, BiasedParams, Params


class Loss(NamedTuple):
    """Formulas of a loss for one sample, from `ncjax.peeled.samples`."""

    of_samples: Callable  # (margins or logits, others, *numbers) -> (K, n)
    log_of_samples: Callable | None = None  # its logarithm, if it needs one
    of_margins: bool = True  # False takes the logits
    number: str | None = None  # the setting of `Objective` that the loss takes


_FORMULAS = {
    "cross_entropy": Loss(samples.cross_entropy, samples.log_cross_entropy),
    "focal": Loss(samples.focal, samples.log_focal, number="gamma"),
    "squared_error": Loss(samples.squared_error, of_margins=False),
}
_SMOOTHED = Loss(samples.smoothed_cross_entropy, number="smoothing")
LOSSES = tuple(_FORMULAS)
# Fields of `Objective`: leaves of the pytree, and its static part.
_NUMBERS = ("smoothing", "gamma", "weight_decay", "ball", "bias", "temperature")
_NAMES = ("loss", "fixed_classifier")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    r"""A loss of the logits, with weight decay, on a norm ball, or alone.

    $$F(W, H, b) = \sum_{k,i} \omega_{ki}\, \ell(W h_{k,i} + b, k)
    + \tfrac{\lambda_W}{2} |W|_F^2 + \tfrac{\lambda_H}{2} |H|_F^2
    + \tfrac{\lambda_b}{2} |b|^2$$

    The unconstrained features model (UFM) has weight decay. The layer-peeled model (LPM)
    has $|W|_F^2 \le a$ and $|H|_F^2 \le b$ instead. The unconstrained layer-peeled model
    (ULPM) has neither. Losses are sums over samples. A paper whose loss is the mean over N
    samples has weight decay $\lambda / N$ for our $\lambda$.

    An objective is a function: `objective(params)` is F. It is a pytree whose numbers may
    be traced by `jax.jit`, `jax.grad` and `jax.vmap`; for `jax.vmap` a number is an array.
    Single numbers become floats, so an objective is hashable outside of these, and
    `ncjax.hessian_eig(objective, params)` compiles once per objective.

    Args:
      loss: "cross_entropy", "focal", "squared_error", or a function of logits (N, K) and
        labels (N,) that returns the loss of each sample (N,).
      smoothing: $\alpha$ in [0, 1) of label smoothing, for "cross_entropy".
      gamma: $\gamma \ge 0$ of the focal loss, which needs it.
      weight_decay: $(\lambda_W, \lambda_H)$, not negative.
      ball: $(a, b)$, positive bounds on $|W|_F^2$ and $|H|_F^2$. The value of the objective
        at any point is the loss alone.
      bias: $\lambda_b \ge 0$, the decay of a bias. 0 is a free bias, None no bias. With a
        bias points are `BiasedParams`.
      temperature: $t_0 > 0$; the logits are $t_0\, \hat w_j^\top \hat h_{k,i}$ with unit
        vectors $\hat w$, $\hat h$ (normalised model).
      fixed_classifier: W is a constant, and H alone moves.

    Raises:
      ValueError: a setting is out of range, missing, or does not go with another.

    Source: Zhu et al. (NeurIPS 2021) for the UFM; Fang et al. (PNAS 2021) for the LPM; Ji
    et al. (ICLR 2022) for the ULPM and Table 1, which compares them.

    >>> import ncjax
    >>> objective = ncjax.Objective("cross_entropy", weight_decay=(0.1, 0.4))
    >>> round(float(objective.mu), 6)
    0.2
    """

    loss: str | Callable = "cross_entropy"
    _: dataclasses.KW_ONLY
    smoothing: float | None = None
    gamma: float | None = None
    weight_decay: tuple[float, float] | None = None
    ball: tuple[float, float] | None = None
    bias: float | None = None
    temperature: float | None = None
    fixed_classifier: bool = False

    def __post_init__(self):
        """Check the settings."""
        if not callable(self.loss):
            check_choice("loss", self.loss, LOSSES)
        check_settings(self)

    def __repr__(self):
        """Return the call with the settings that differ from their defaults."""
        values = {name: getattr(self, name) for name in (*_NUMBERS, *_NAMES[1:])}
        given = [
            f"{name}={value!r}"
            for name, value in values.items()
            if value is not None and value is not False
        ]
        return f"Objective({', '.join([repr(self.loss), *given])})"

    def tree_flatten_with_keys(self):
        """Return the numbers, which may be traced, and the names."""
        numbers = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in _NUMBERS]
        return numbers, tuple(getattr(self, name) for name in _NAMES)

    @classmethod
    def tree_unflatten(cls, names: tuple, numbers: Iterable) -> "Objective":
        """Return an objective without checks: a gradient may be negative."""
        objective = object.__new__(cls)
        for field, value in zip(_NUMBERS + _NAMES, (*numbers, *names), strict=True):
            object.__setattr__(objective, field, value)
        return objective

    def __call__(self, params, weights=None) -> Array:
        """Return the value F at a point, a scalar.

        Args:
          params: `Params`, or `BiasedParams` if the objective has a bias.
          weights: (K, n) or (K,) weights, see `sample_weights`; 1 if None.

        Raises:
          ValueError: shapes or dtypes do not fit.
        """
        params, weights = self.check(params, weights)
        value = self._loss(params, weights)
        if self.weight_decay is not None:
            for decay, leaf in zip(self.weight_decay, params, strict=False):
                value = value + decay / 2 * jnp.sum(leaf**2)
        if self.bias is not None:
            value = value + self.bias / 2 * jnp.sum(params.b**2)
        return value

    @property
    def mu(self):
        r"""$\mu = \sqrt{\lambda_W \lambda_H}$, None without weight decay."""
        return None if self.weight_decay is None else _root_of_product(self.weight_decay)

    @property
    def tau(self):
        r"""$\tau = \sqrt{a b}$, None without a ball."""
        return None if self.ball is None else _root_of_product(self.ball)

    @property
    def regularised(self) -> bool:
        """Whether the norms are bounded by decay, a ball or a temperature."""
        bounds = (self.weight_decay, self.ball, self.temperature)
        return any(bound is not None for bound in bounds)

    def loss_value(self, params, weights=None) -> Array:
        """Return the weighted sum of the losses, without decay, a scalar."""
        return self._loss(*self.check(params, weights))

    def log_loss(self, params, weights=None) -> Array:
        """Return the natural logarithm of `loss_value`, which does not underflow."""
        params, weights = self.check(params, weights)
        formula = self._formula()
        if formula.log_of_samples is None:
            return jnp.log(self._loss(params, weights))
        logs = formula.log_of_samples(
            *self._arguments(formula, params), *self._numbers(formula)
        )
        return log_sum(logs, weights)

    def sample_losses(self, params) -> Array:
        """Return the loss of each sample, (K, n), without weights."""
        params, _ = self.check(params)
        return self._of_samples(params)

    def slopes(self, params, weights=None) -> Array:
        r"""Return $G_{kij} = \omega_{ki}\, \partial \ell_{ki} / \partial z_{kij}$.

        The slopes of the cross entropy are the softmax probabilities minus the targets.
        They keep their digits where probabilities are near 0 or 1.

        Returns:
          (K, n, K) array.
        """
        params, weights = self.check(params, weights)
        formula = self._formula()

        def total(arguments, others):
            losses = formula.of_samples(arguments, others, *self._numbers(formula))
            return jnp.sum(weighted(losses, weights))

        arguments, others = self._arguments(formula, params)
        slopes = jax.grad(total)(arguments, others)
        if not formula.of_margins:
            return slopes
        slopes = jnp.where(others, slopes, 0)
        return jnp.where(others, -slopes, jnp.sum(slopes, axis=-1, keepdims=True))

    def on_boundary(self, params, weights=None) -> Array:
        r"""Return the loss at $(\sqrt a\, W/|W|_F, \sqrt b\, H/|H|_F)$, a scalar.

        At a point of the boundary its plain Hessian is the Riemannian Hessian on the
        product of the two spheres, with eigenvalue 0 in the two radial directions.

        Raises:
          ValueError: the objective has no ball, or shapes or dtypes do not fit.
        """
        if self.ball is None:
            raise ValueError("on_boundary needs an objective with a ball, got none")
        params, weights = self.check(params, weights)
        units = (at_unit_scale(leaf) for leaf in params)
        W, H = (
            bound**0.5 * unit / jnp.sqrt(jnp.sum(unit**2))
            for bound, unit in zip(self.ball, units, strict=False)
        )
        return self._loss(params._replace(W=W, H=H), weights)

    def check(self, params, weights=None, *, finite: bool = False):
        """Return the point in at least float32 and the weights (K, n) or None.

        The rows of H of samples of weight 0 are set to 0.

        Raises:
          ValueError: shapes or dtypes do not fit, or with `finite` a value is not finite.
        """
        if self.bias is None and isinstance(params, BiasedParams):
            raise ValueError(
                "the objective has no bias, got BiasedParams: pass params.unbiased, or "
                "bias=0.0 for a free bias"
            )
        check = check_params if self.bias is None else check_biased_params
        params = widen(check(params, finite=finite))
        if self.fixed_classifier:
            params = params._replace(W=jax.lax.stop_gradient(params.W))
        weights = check_weights(weights, params)
        return without_left_out(params, weights), weights

    def _formula(self) -> Loss:
        if callable(self.loss):
            return _of_function(self.loss)
        if self.loss == "cross_entropy" and self.smoothing is not None:
            return _SMOOTHED
        return _FORMULAS[self.loss]

    def _numbers(self, formula: Loss) -> tuple:
        return () if formula.number is None else (getattr(self, formula.number),)

    def _loss(self, params, weights) -> Array:
        return jnp.sum(weighted(self._of_samples(params), weights))

    def _of_samples(self, params) -> Array:
        formula = self._formula()
        arguments = self._arguments(formula, params)
        return formula.of_samples(*arguments, *self._numbers(formula))

    def _arguments(self, formula: Loss, params) -> tuple[Array, Array]:
        """Return the margins or logits (K, n, K) that the loss takes, and the mask."""
        if self.temperature is not None:
            W, H = unit_rows(params.W), unit_rows(params.H)
            params = Params(self.temperature * W, H)
        margins, others = samples.margins_of(params)
        return (margins if formula.of_margins else samples.logits_of(params)), others


def require_objective(objective) -> None:
    """Raise ValueError unless the argument `objective` is an `Objective`."""
    if not isinstance(objective, Objective):
        raise ValueError(
            "objective must be an ncjax.Objective, such as ncjax.Objective("
            f'"cross_entropy", weight_decay=(0.1, 0.1)), got {type(objective).__name__}'
        )


def _of_function(loss: Callable) -> Loss:
    """Return the formulas of a function of logits (N, K) and labels (N,)."""

    def of_samples(logits, _others):
        num_classes, per_class, _ = logits.shape
        labels = jnp.repeat(jnp.arange(num_classes), per_class)
        return loss(logits.reshape(-1, num_classes), labels).reshape(-1, per_class)

    return Loss(of_samples, of_margins=False)


def _root_of_product(pair):
    """Return sqrt(x y), also where x y is below or above the range of floats."""
    first, second = pair
    if not isinstance(first, float) or not isinstance(second, float):
        return jnp.sqrt(first) * jnp.sqrt(second)
    product = first * second
    if sys.float_info.min <= product < math.inf:
        return math.sqrt(product)
    return math.sqrt(first) * math.sqrt(second)


def unit_rows(rows: Array) -> Array:
    """Return rows of norm 1; a row of zeros stays, with slope 0."""
    squares = einsum("...d,...d->...", rows, rows)[..., None]
    return jnp.where(squares > 0, rows, 0) / jnp.sqrt(jnp.where(squares > 0, squares, 1))
