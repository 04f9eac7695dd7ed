"""The gradient flow of the layer-peeled model to any physical time, and its solvers."""

from ncjax.flow.descent import DescentSolution as DescentSolution
from ncjax.flow.descent import gradient_descent as gradient_descent
from ncjax.flow.invariants import InvariantDrift as InvariantDrift
from ncjax.flow.invariants import invariant_drift as invariant_drift
from ncjax.flow.invariants import restore_invariants as restore_invariants
from ncjax.flow.solve import FlowSolution as FlowSolution
from ncjax.flow.solve import gradient_flow as gradient_flow
