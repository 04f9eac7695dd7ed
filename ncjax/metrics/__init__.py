"""Measure neural collapse: in the layer-peeled model, in features, in a last layer."""

from ncjax.metrics import conventions as conventions
from ncjax.metrics import depth as depth
from ncjax.metrics import layers as layers
from ncjax.metrics import measures as measures
from ncjax.metrics import statistics as statistics
from ncjax.metrics import variants as variants
from ncjax.metrics.by_layer import CollapseByLayer as CollapseByLayer
from ncjax.metrics.by_layer import collapse_by_layer as collapse_by_layer
from ncjax.metrics.collapse import CollapseMetrics as CollapseMetrics
from ncjax.metrics.collapse import (
    class_distance_normalised_variance as class_distance_normalised_variance,
)
from ncjax.metrics.collapse import collapse_metrics as collapse_metrics
from ncjax.metrics.collapse import (
    collapse_metrics_from_features as collapse_metrics_from_features,
)
from ncjax.metrics.collapse import metrics_from_statistics as metrics_from_statistics
from ncjax.metrics.collapse import within_class_quotient as within_class_quotient
from ncjax.metrics.duality import DualityParts as DualityParts
from ncjax.metrics.duality import duality_parts as duality_parts
from ncjax.metrics.layers import Layerwise as Layerwise
from ncjax.metrics.layers import layerwise as layerwise
from ncjax.metrics.meter import CollapseMeter as CollapseMeter
from ncjax.metrics.meter import SecondPass as SecondPass
from ncjax.metrics.peeling import LastLayer as LastLayer
from ncjax.metrics.peeling import balance_norms as balance_norms
from ncjax.metrics.peeling import last_layer as last_layer
from ncjax.metrics.peeling import peel as peel
from ncjax.metrics.report import CollapseReport as CollapseReport
