r"""The flow's equation on the clock x, for a scaled state Y that hardly moves.

With $x = \log(1 + \log(1 + t))$ and $u = \log(1 + t) = e^x - 1$ the flow is $dZ/dx = -s
\nabla \log \mathcal L(Z)$, $s = (1 + u)\, e^{u + \log \mathcal L}$. Since $|Z|^2$ grows
like $u^{2/p}$, where p is the number of factors (2 for `Params`, L + 1 for `DeepParams`),
the solvers follow $Y = e^{-x/p} Z$,

$$\frac{dY}{dx} = -s\, e^{-x/p}\, \nabla \log \mathcal L(e^{x/p} Y) - \frac{Y}{p}.$$

The gradient of a function of the margins is homogeneous of degree p - 1 at fixed slopes:
with the products of the factors of Y in place of Z its factor is $s\, e^{(1 - 2/p) x}$. It
stays bounded, because $u + \log \mathcal L$ falls like $-(2 - 2/p) \log u$.

Because s contains the loss, the rank-one terms of $\nabla^2 \log \mathcal L$ and of $\nabla
s$ cancel, and the Jacobian is exactly $-s\, \nabla^2 \mathcal L / \mathcal L - I/p$.

$\mathcal L$ is the cross entropy or the focal loss, a sum over samples with weights. If the
loss of a sample decays like $e^{-\chi m}$ in its margin m, the factor stays bounded for any
$\chi > 0$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.flow import block_solve, deep_solve
from ncjax.flow.rosenbrock import Rodas5P
from ncjax.numerics import einsum, on_device
from ncjax.objectives import Objective
from ncjax.peeled.kernels import error_slopes
from ncjax.peeled.points import Point, as_deep, degree_of, last_factors, like
from ncjax.types import Array, DeepParams, Params


class Loss(NamedTuple):
    """The loss of the flow, an argument of its equation. Without weights it is no array."""

    weights: Array | None = None  # (K, n), None for 1
    gamma: Array | None = None  # () of the focal loss, None for cross entropy


CROSS_ENTROPY = Loss()


def check_objective(objective: Objective | None, dtype, *, deep: bool) -> Array | None:
    """Return gamma of the focal loss, () in `dtype`, or None for cross entropy.

    Args:
      objective: an objective or None.
      dtype: dtype of the flow.
      deep: whether the start has several layers; the advice depends on it.

    Raises:
      ValueError: the objective is not cross entropy or focal loss alone.
    """
    if objective is None:
        return None
    alone = Objective(objective.loss, gamma=objective.gamma)
    if objective.loss not in ("cross_entropy", "focal") or objective != alone:
        advice = "pass plain times t as times= for any objective"
        if deep:
            advice = "several layers have the flow of these two losses alone"
        raise ValueError(
            "log_times need the cross entropy or the focal loss alone, got "
            f"{objective}: {advice}"
        )
    return None if objective.gamma is None else on_device(objective.gamma, dtype)


def clock(log_times: Array) -> Array:
    """Return `x = log(1 + log(1 + t))` for `log t`."""
    return jnp.log1p(jax.nn.softplus(log_times))


def unscaled(x: Array, scaled: Point) -> Point:
    """Return `Z = e^{x/p} Y`; with -x in place of x, Y for Z."""
    p = degree_of(scaled)
    return jax.tree.map(lambda leaf: jnp.exp(x / p) * leaf, scaled)


def field(x, scaled: Point, loss: Loss = CROSS_ENTROPY) -> Point:
    """`dY/dx`. The loss depends on the logits alone: the last layer takes all scales."""
    p, (layers, H) = degree_of(scaled), as_deep(scaled)
    inputs = [H]  # of each layer
    for W in layers[:-1]:
        inputs.append(einsum("kid,ed->kie", inputs[-1], W))
    log_loss, P, _ = error_slopes(Params(jnp.exp(x) * layers[-1], inputs[-1]), *loss)
    rate = speed(x, log_loss)
    P = (rate if p == 2 else rate * jnp.exp((1 - 2 / p) * x)) * P
    slopes = []  # of each layer, from the last to the first
    for W, h in zip(reversed(layers), reversed(inputs), strict=True):
        slopes.append(einsum("kij,kid->jd", P, h))
        P = einsum("kij,jd->kid", P, W)
    slope = like(scaled, slopes[::-1], P)
    return jax.tree.map(lambda slope, leaf: -slope - leaf / p, slope, scaled)


def speed(x: Array, log_loss: Array) -> Array:
    """`s`, the factor of `-∇log L` in dZ/dx."""
    u = jnp.expm1(x)
    return (1 + u) * jnp.exp(u + log_loss)


def _factor(x, scaled, loss: Loss, c):
    """`I - c J = (1 + c/p) (I + c s / (1 + c/p) ∇²L / L)` for cross entropy."""
    params = unscaled(x, scaled)
    slopes = error_slopes(last_factors(params), loss.weights)
    log_loss, _, _ = slopes
    outer = 1 + c / degree_of(params)
    inner = c / outer * speed(x, log_loss)
    algebra = _algebra(params)
    return outer, algebra.factor(params, slopes, inner, loss.weights)


def _solve(factored, right):
    outer, inner = factored
    algebra = _algebra(right)
    return algebra.solve(inner, jax.tree.map(lambda leaf: leaf / outer, right))


def _algebra(params: Params | DeepParams):
    """Return the module of the linear algebra for this kind of point."""
    return deep_solve if isinstance(params, DeepParams) else block_solve


def _time_derivative(x, scaled, loss: Loss):
    return jax.jvp(lambda x: field(x, scaled, loss), (x,), (jnp.ones_like(x),))[1]


# Rodas5P for `field`. There is one object, because compiled functions take it as a static
# argument.
LINEARLY_IMPLICIT = Rodas5P(_factor, _solve, _time_derivative)
