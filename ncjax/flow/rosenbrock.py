"""Rodas5P, a linearly implicit Rosenbrock method, as a solver for diffrax."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox
import jax
import jax.numpy as jnp
import numpy as np

from ncjax.numerics import tensordot

# Steinebach (2023), Tables 3 and 4, in the transformed variables of Hairer and Wanner
# (Solving ODEs II, equation (IV.7.25)), where no product with the Jacobian is left.
_GAMMA = 0.21193756319429014
# fmt: off
_C = (
    0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664,
    1.0, 1.0, 1.0,
)
_D = (
    _GAMMA, -2 * _GAMMA, -0.3384627126235924, 1.8046452872882734, 2.325825639765069,
    0.0, 0.0, 0.0,
)
_SIXTH = (
    -7.502846399306121, 2.561846144803919, -11.627539656261098,
    -0.18268767659942256, 0.030198172008377946,
)
_A = (
    (),
    (3.0,),
    (2.849394379747939, 0.45842242204463923),
    (-6.954028509809101, 2.489845061869568, -10.358996098473584),
    (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
    _SIXTH,
    (*_SIXTH, 1.0),
    (*_SIXTH, 1.0, 1.0),
)
_COUPLING = (
    (),
    (-14.155112264123755,),
    (-17.97296035885952, -2.859693295451294),
    (147.12150275711716, -1.41221402718213, 71.68940251302358),
    (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
    (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125,
     -0.6610691825249471),
    (30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783,
     -19.097331116725623, -28.087943162872662),
    (37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047,
     -40.06618937091002, -54.66780262877968, -9.48861652309627),
)
_DENSE = (
    (25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204,
     0.524948541321073, 1.1241088310450404, 0.4272876194431874, -0.17202221070155493),
    (-9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796,
     20.176138334709044, 15.98066361424651, -6.789040303419874, -6.710236069923372),
    (11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643,
     -52.072871366152654, -59.78993625266729, -0.15582684282751913, 4.883087185713722),
)
# fmt: on
_STAGES = 8


def _square(rows) -> np.ndarray:
    """Return the rows of a strictly lower triangular matrix, padded with zeros."""
    return np.array([[*row, *(0.0,) * (_STAGES - len(row))] for row in rows])


class Interpolation(diffrax.AbstractLocalInterpolation):
    r"""$y_0 + \theta (y_1-y_0) + \theta (1-\theta)(k_1 + \theta k_2 + \theta^2 k_3)$."""

    t0: Any  # type: ignore[misc]
    t1: Any  # type: ignore[misc]
    y0: Any
    y1: Any
    k: Any  # leaves (3, ...)

    def evaluate(self, t0, t1=None, left=True):
        """Return the state at `t0`, or its change from `t0` to `t1`."""
        if t1 is not None:
            ends = self.evaluate(t1, left=left), self.evaluate(t0, left=left)
            return jax.tree.map(jnp.subtract, *ends)
        length = jnp.where(self.t1 == self.t0, 1, self.t1 - self.t0)
        theta = (t0 - self.t0) / length

        def leaf(y0, y1, k):
            bent = k[0] + theta * (k[1] + theta * k[2])
            return y0 + theta * ((y1 - y0) + (1 - theta) * bent)

        return jax.tree.map(leaf, self.y0, self.y1, self.k)


class Rodas5P(diffrax.AbstractAdaptiveSolver):
    r"""Linearly implicit, stiffly accurate, L-stable method of order 5.

    For $y' = f(t, y)$ with Jacobian $J$, a step of size $h$ solves eight linear systems
    with one matrix, $1 \le i \le 8$:

    $$(I - h\gamma J)\, u_i = h\gamma \Bigl( f\bigl(t + c_i h, y + \textstyle\sum_{j<i}
    a_{ij} u_j\bigr) + \tfrac1h \sum_{j<i} C_{ij} u_j + h d_i\, \partial_t f \Bigr),$$

    and $y + \sum_j a_{8j} u_j + u_8$ is the new state, $u_8$ the estimate of its error.
    The dense output is of order 4.

    The equation supplies its own linear algebra:

    Args:
      factor: function of `(t, y, args, c)` that returns `I - c J(t, y)`, prepared for
        `solve`, as any pytree.
      solve: function of the result of `factor` and a right-hand side shaped like y.
      time_derivative: function of `(t, y, args)`, the partial derivative of f in t.

    Source: Steinebach, BIT 63:27 (2023), doi 10.1007/s10543-023-00967-x.
    """

    factor: Callable = equinox.field(static=True)
    solve: Callable = equinox.field(static=True)
    time_derivative: Callable = equinox.field(static=True)

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = Interpolation

    def order(self, terms):
        """Return the order of the solution."""
        return 5

    def init(self, terms, t0, t1, y0, args):
        """Return None: no state passes from step to step."""
        return None

    def func(self, terms, t0, y0, args):
        """Return the vector field."""
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """Take one step from `t0` to `t1`."""
        h = t1 - t0
        dtype = jnp.result_type(*jax.tree.leaves(y0))
        tables = [_square(_A), _square(_COUPLING), np.array(_C), np.array(_D)]
        a, coupling, c, d = (jnp.asarray(table, dtype) for table in tables)
        factored = self.factor(t0, y0, args, _GAMMA * h)
        drift = self.time_derivative(t0, y0, args)

        def stage(u, row):
            index, a_i, coupling_i, c_i, d_i = row
            y = jax.tree.map(lambda leaf, u: leaf + tensordot(a_i, u, 1), y0, u)
            slope = terms.vf(t0 + c_i * h, y, args)
            right = jax.tree.map(
                lambda f, u, df: (
                    _GAMMA * (h * (f + d_i * h * df) + tensordot(coupling_i, u, 1))
                ),
                slope,
                u,
                drift,
            )
            new = self.solve(factored, right)
            return jax.tree.map(lambda u, new: u.at[index].set(new), u, new), None

        empty = jax.tree.map(lambda leaf: jnp.zeros((_STAGES, *leaf.shape), dtype), y0)
        rows = (jnp.arange(_STAGES), a, coupling, c, d)
        u, _ = jax.lax.scan(stage, empty, rows)
        y1 = jax.tree.map(lambda leaf, u: leaf + tensordot(a[-1], u, 1) + u[-1], y0, u)
        error = jax.tree.map(lambda u: u[-1], u)
        dense = jnp.asarray(_DENSE, dtype)
        k = jax.tree.map(lambda u: tensordot(dense, u, 1), u)
        info = {"y0": y0, "y1": y1, "k": k}
        return y1, error, info, None, diffrax.RESULTS.successful
