"""Experiments of ncjax: `python -m experiments` lists them."""

from experiments import _start

# Modules with a `Config` and a `run`, in the order of the report.
EXPERIMENTS = (
    *("ulpm_flow", "animation", "saddle_analysis", "neighbours", "deep_flow", "theorems"),
    *("network_flow", "train_resnet", "train_vgg", "train_small", "peel"),
    "layers",
)
COMMANDS = (*EXPERIMENTS, "report")

if _start.is_command():
    _start.prepare()
