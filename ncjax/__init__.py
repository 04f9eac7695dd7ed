"""ncjax: the theory of neural collapse in JAX.

The unconstrained layer-peeled model of Ji, Lu, Zhang, Deng and Su (ICLR 2022) as pure
functions: losses, exact gradient flow, collapse metrics, curvature. Networks that are
trained to collapse live in `ncjax.networks`, which this does not import.
"""

from ncjax.curvature import HessianEig as HessianEig
from ncjax.curvature import SpectralDensity as SpectralDensity
from ncjax.curvature import hessian_eig as hessian_eig
from ncjax.curvature import hvp as hvp
from ncjax.curvature import spectral_density as spectral_density
from ncjax.flow import DescentSolution as DescentSolution
from ncjax.flow import FlowSolution as FlowSolution
from ncjax.flow import InvariantDrift as InvariantDrift
from ncjax.flow import gradient_descent as gradient_descent
from ncjax.flow import gradient_flow as gradient_flow
from ncjax.flow import invariant_drift as invariant_drift
from ncjax.flow import restore_invariants as restore_invariants
from ncjax.metrics import CollapseMeter as CollapseMeter
from ncjax.metrics import CollapseMetrics as CollapseMetrics
from ncjax.metrics import CollapseReport as CollapseReport
from ncjax.metrics import DualityParts as DualityParts
from ncjax.metrics import LastLayer as LastLayer
from ncjax.metrics import Layerwise as Layerwise
from ncjax.metrics import balance_norms as balance_norms
from ncjax.metrics import collapse_metrics as collapse_metrics
from ncjax.metrics import collapse_metrics_from_features as collapse_metrics_from_features
from ncjax.metrics import conventions as conventions
from ncjax.metrics import depth as depth
from ncjax.metrics import duality_parts as duality_parts
from ncjax.metrics import last_layer as last_layer
from ncjax.metrics import layers as layers
from ncjax.metrics import layerwise as layerwise
from ncjax.metrics import measures as measures
from ncjax.metrics import peel as peel
from ncjax.metrics import statistics as statistics
from ncjax.metrics import variants as variants
from ncjax.peeled import KKT as KKT
from ncjax.peeled import VERDICTS as VERDICTS
from ncjax.peeled import Certificate as Certificate
from ncjax.peeled import balance as balance
from ncjax.peeled import block_saddle as block_saddle
from ncjax.peeled import certificate as certificate
from ncjax.peeled import cross_entropy as cross_entropy
from ncjax.peeled import init_params as init_params
from ncjax.peeled import kkt as kkt
from ncjax.peeled import kkt_angle as kkt_angle
from ncjax.peeled import log_cross_entropy as log_cross_entropy
from ncjax.peeled import losses as losses
from ncjax.peeled import margin_ratio as margin_ratio
from ncjax.peeled import margins as margins
from ncjax.peeled import separation as separation
from ncjax.peeled import simplex_etf as simplex_etf
from ncjax.peeled import solve_separation as solve_separation
from ncjax.peeled import squared_norm as squared_norm
from ncjax.types import Params as Params
