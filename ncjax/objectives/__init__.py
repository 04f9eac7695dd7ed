"""Objectives beside the paper's: weight decay, norm balls, other losses, any class sizes.

`objective` holds `Objective`, a loss with weight decay, on a norm ball, or alone.
`minimisers` holds its minimisers in closed form, `spectra` the spectra of the Hessian,
`saddles` critical points that are not minima, and `step` two sizes of classes.
`certificates` judges points, by the lower bounds of `bounds` and `focal_bound`.
`deep_collapse` holds the collapse of several layers with weight decay.
"""

from ncjax.objectives.certificates import POINT_VERDICTS as POINT_VERDICTS
from ncjax.objectives.certificates import PointCertificate as PointCertificate
from ncjax.objectives.certificates import certificate as certificate
from ncjax.objectives.deep_collapse import DecayedCollapse as DecayedCollapse
from ncjax.objectives.deep_collapse import decayed_collapse as decayed_collapse
from ncjax.objectives.minimisers import Minimiser as Minimiser
from ncjax.objectives.minimisers import minimiser as minimiser
from ncjax.objectives.objective import Objective as Objective
from ncjax.objectives.saddles import CriticalPoint as CriticalPoint
from ncjax.objectives.saddles import block_point as block_point
from ncjax.objectives.saddles import rank_point as rank_point
from ncjax.objectives.spectra import Spectrum as Spectrum
from ncjax.objectives.spectra import spectrum as spectrum
from ncjax.objectives.step import minority_collapse_ratio as minority_collapse_ratio
