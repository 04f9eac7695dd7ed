"""The gradient flow of the layer-peeled model to any physical time, and gradient descent.

`solve` holds `gradient_flow`, `clock` the equation that it solves, and `methods` the table
of solvers: explicit (diffrax's Tsit5), `stabilised` and implicit (`rosenbrock`,
`block_solve`, `deep_solve`). `regularised` follows objectives with weight decay or on a
ball in plain time. `invariants` holds the conserved quantities, `descent` gradient descent.
"""

from ncjax.flow.descent import DescentSolution as DescentSolution
from ncjax.flow.descent import gradient_descent as gradient_descent
from ncjax.flow.invariants import InvariantDrift as InvariantDrift
from ncjax.flow.invariants import invariant_drift as invariant_drift
from ncjax.flow.invariants import restore_invariants as restore_invariants
from ncjax.flow.regularised import ObjectiveFlow as ObjectiveFlow
from ncjax.flow.solve import FlowSolution as FlowSolution
from ncjax.flow.solve import gradient_flow as gradient_flow
