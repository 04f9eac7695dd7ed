"""ncjax: the theory of neural collapse in JAX.

The unconstrained layer-peeled model of Ji, Lu, Zhang, Deng and Su (ICLR 2022) as pure
functions: losses, exact gradient flow, collapse metrics. Networks that are trained to
collapse live in `ncjax.models`, `ncjax.data` and `ncjax.train`, imported by name.
"""

from ncjax import measures as measures
from ncjax import statistics as statistics
from ncjax import variants as variants
from ncjax.flow import DescentSolution as DescentSolution
from ncjax.flow import FlowSolution as FlowSolution
from ncjax.flow import gradient_descent as gradient_descent
from ncjax.flow import gradient_flow as gradient_flow
from ncjax.geometry import balance as balance
from ncjax.geometry import block_saddle as block_saddle
from ncjax.geometry import margin_ratio as margin_ratio
from ncjax.geometry import margins as margins
from ncjax.geometry import simplex_etf as simplex_etf
from ncjax.geometry import squared_norm as squared_norm
from ncjax.hessian import hvp as hvp
from ncjax.invariants import InvariantDrift as InvariantDrift
from ncjax.invariants import invariant_drift as invariant_drift
from ncjax.invariants import restore_invariants as restore_invariants
from ncjax.landscape import HessianEig as HessianEig
from ncjax.landscape import SpectralDensity as SpectralDensity
from ncjax.landscape import hessian_eig as hessian_eig
from ncjax.landscape import spectral_density as spectral_density
from ncjax.losses import cross_entropy as cross_entropy
from ncjax.losses import log_cross_entropy as log_cross_entropy
from ncjax.metrics import CollapseMetrics as CollapseMetrics
from ncjax.metrics import collapse_metrics as collapse_metrics
from ncjax.metrics import collapse_metrics_from_features as collapse_metrics_from_features
from ncjax.peeling import LastLayer as LastLayer
from ncjax.peeling import balance_norms as balance_norms
from ncjax.peeling import last_layer as last_layer
from ncjax.peeling import peel as peel
from ncjax.separation import KKT as KKT
from ncjax.separation import VERDICTS as VERDICTS
from ncjax.separation import Certificate as Certificate
from ncjax.separation import certificate as certificate
from ncjax.separation import kkt as kkt
from ncjax.separation import kkt_angle as kkt_angle
from ncjax.separation import solve_separation as solve_separation
from ncjax.types import Params as Params
from ncjax.types import init_params as init_params
