r"""The flow's equation on the clock x, for a scaled state Y that hardly moves.

With $x = \log(1 + \log(1 + t))$ and $u = \log(1 + t) = e^x - 1$ the flow is $dZ/dx = -s
\nabla \log \mathcal L(Z)$, $s = (1 + u)\, e^{u + \log \mathcal L}$. Since $|Z|^2$ grows
like u, the solvers follow $Y = e^{-x/2} Z$,

$$\frac{dY}{dx} = -s\, e^{-x/2}\, \nabla \log \mathcal L(e^{x/2} Y) - \frac{Y}{2}.$$

Because s contains the loss, the rank-one terms of $\nabla^2 \log \mathcal L$ and of $\nabla
s$ cancel, and the Jacobian is exactly $-s\, \nabla^2 \mathcal L / \mathcal L - I/2$.

$\mathcal L$ is the cross entropy or the focal loss, a sum over samples with weights. If the
loss of a sample decays like $e^{-\chi m}$ in its margin m, s stays bounded for any
$\chi > 0$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ncjax.flow import block_solve
from ncjax.flow.rosenbrock import Rodas5P
from ncjax.numerics import einsum, on_device
from ncjax.objectives import Objective
from ncjax.peeled.kernels import error_slopes
from ncjax.types import Array, Params


class Loss(NamedTuple):
    """The loss of the flow, an argument of its equation. Without weights it is no array."""

    weights: Array | None = None  # (K, n), None for 1
    gamma: Array | None = None  # () of the focal loss, None for cross entropy


CROSS_ENTROPY = Loss()


def check_objective(objective: Objective | None, dtype) -> Array | None:
    """Return gamma of the focal loss, () in `dtype`, or None for cross entropy.

    Raises:
      ValueError: the objective is not cross entropy or focal loss alone.
    """
    if objective is None:
        return None
    alone = Objective(objective.loss, gamma=objective.gamma)
    if objective.loss not in ("cross_entropy", "focal") or objective != alone:
        raise ValueError(
            "log_times need the cross entropy or the focal loss alone, got "
            f"{objective}: pass plain times t as times= for any objective"
        )
    return None if objective.gamma is None else on_device(objective.gamma, dtype)


def clock(log_times: Array) -> Array:
    """Return `x = log(1 + log(1 + t))` for `log t`."""
    return jnp.log1p(jax.nn.softplus(log_times))


def unscaled(x: Array, scaled: Params) -> Params:
    """Return `Z = e^{x/2} Y`; with -x in place of x, Y for Z."""
    return jax.tree.map(lambda leaf: jnp.exp(x / 2) * leaf, scaled)


def field(x, scaled: Params, loss: Loss = CROSS_ENTROPY) -> Params:
    """`dY/dx`. The loss depends on `W h` alone, so W takes the scale of both factors."""
    W, H = scaled
    log_loss, P, _ = error_slopes(Params(jnp.exp(x) * W, H), *loss)
    P = speed(x, log_loss) * P
    dW = einsum("kij,kid->jd", P, H)
    dH = einsum("kij,jd->kid", P, W)
    return Params(-dW - W / 2, -dH - H / 2)


def speed(x: Array, log_loss: Array) -> Array:
    """`s`, the factor of `-∇log L` in dZ/dx."""
    u = jnp.expm1(x)
    return (1 + u) * jnp.exp(u + log_loss)


def _factor(x, scaled, loss: Loss, c):
    """`I - c J = (1 + c/2) (I + c s / (1 + c/2) ∇²L / L)` for cross entropy."""
    params = unscaled(x, scaled)
    slopes = error_slopes(params, loss.weights)
    log_loss, _, _ = slopes
    outer = 1 + c / 2
    inner = c / outer * speed(x, log_loss)
    return outer, block_solve.factor(params, slopes, inner, loss.weights)


def _solve(factored, right):
    outer, inner = factored
    return block_solve.solve(inner, jax.tree.map(lambda leaf: leaf / outer, right))


def _time_derivative(x, scaled, loss: Loss):
    return jax.jvp(lambda x: field(x, scaled, loss), (x,), (jnp.ones_like(x),))[1]


# Rodas5P for `field`. There is one object, because compiled functions take it as a static
# argument.
LINEARLY_IMPLICIT = Rodas5P(_factor, _solve, _time_derivative)
