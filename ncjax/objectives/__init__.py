"""Objectives beside the paper's: weight decay, norm balls, other losses, any class sizes.

`objective` holds `Objective`, a loss with weight decay, on a norm ball, or alone.
"""

from ncjax.objectives.objective import Objective as Objective
