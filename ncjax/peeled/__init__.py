"""The layer-peeled model of Ji et al. (ICLR 2022): points, losses, optimality.

`geometry` draws starts and holds simplex ETF, block saddles, margins and balance. `losses`
holds the cross entropy in margin form and its logarithm, and other losses. `weights` lets
classes have any size, `deep` adds linear layers. `separation` holds the minimum-norm
separation problem: multipliers, KKT residuals and certificate; `deep_separation` the
certificate of several layers, `margin_bound` the margin ratio. `optimum` holds its
solution, `codes` and `polygon` hold other KKT directions, `nearest` tells them apart.

Half precision (float16, bfloat16) is computed in float32. Results are float32; only
derivatives keep the dtype of the params.
"""

from ncjax.peeled.codes import SoftmaxCode as SoftmaxCode
from ncjax.peeled.codes import softmax_codes as softmax_codes
from ncjax.peeled.deep import init_deep_params as init_deep_params
from ncjax.peeled.deep_separation import DEEP_VERDICTS as DEEP_VERDICTS
from ncjax.peeled.deep_separation import DeepCertificate as DeepCertificate
from ncjax.peeled.geometry import balance as balance
from ncjax.peeled.geometry import block_saddle as block_saddle
from ncjax.peeled.geometry import init_params as init_params
from ncjax.peeled.geometry import margins as margins
from ncjax.peeled.geometry import simplex_etf as simplex_etf
from ncjax.peeled.geometry import squared_norm as squared_norm
from ncjax.peeled.losses import cross_entropy as cross_entropy
from ncjax.peeled.losses import log_cross_entropy as log_cross_entropy
from ncjax.peeled.margin_bound import margin_ratio as margin_ratio
from ncjax.peeled.nearest import NearestCode as NearestCode
from ncjax.peeled.nearest import nearest_code as nearest_code
from ncjax.peeled.optimum import Separation as Separation
from ncjax.peeled.optimum import separation_value as separation_value
from ncjax.peeled.optimum import solve_separation as solve_separation
from ncjax.peeled.polygon import PolygonSaddle as PolygonSaddle
from ncjax.peeled.polygon import polygon_saddle as polygon_saddle
from ncjax.peeled.separation import KKT as KKT
from ncjax.peeled.separation import VERDICTS as VERDICTS
from ncjax.peeled.separation import Certificate as Certificate
from ncjax.peeled.separation import certificate as certificate
from ncjax.peeled.separation import kkt as kkt
from ncjax.peeled.separation import kkt_angle as kkt_angle
from ncjax.peeled.weights import sample_weights as sample_weights
