"""The sections of `benchmarks.accelerator`: their checks and their limits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import (
    _accelerator_environment,
    _accelerator_flow,
    _accelerator_hessian,
    _accelerator_metrics,
    _accelerator_numerics,
    _accelerator_step,
    _accelerator_tests,
    _accelerator_torch,
    _accelerator_train,
    _accelerator_wide,
)
from benchmarks._accelerator_checks import Check, Setting


class Section(NamedTuple):
    """A group of checks that run in one process."""

    checks: Callable[[Setting], Sequence[Check]]
    seconds: int  # at most, start of the process included


# In the order in which they run. All limits together are below nine minutes.
SECTIONS = {
    "environment": Section(_accelerator_environment.checks, 30),
    "numerics": Section(_accelerator_numerics.checks, 85),
    "step": Section(_accelerator_step.checks, 55),
    "torch": Section(_accelerator_torch.checks, 60),
    "train": Section(_accelerator_train.checks, 95),
    "flow": Section(_accelerator_flow.checks, 60),
    "wide": Section(_accelerator_wide.checks, 40),
    "metrics": Section(_accelerator_metrics.checks, 30),
    "hessian": Section(_accelerator_hessian.checks, 35),
    "tests": Section(_accelerator_tests.checks, 40),
}
