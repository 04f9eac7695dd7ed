"""Measure neural collapse in a PyTorch training loop; needs the extra `torch`."""

from ncjax.checks import check_installed

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError:
    check_installed("torch", "torch")
    raise

from ncjax.torch.hooks import Watch as Watch
from ncjax.torch.hooks import watch as watch
from ncjax.torch.recording import RecordedLayers as RecordedLayers
from ncjax.torch.recording import record_layers as record_layers
