"""What the experiments do without the packages of the extras.

`light_experiments.py none` hides all packages of the extras, and `light_experiments.py
experiments FOLDER` those that only the extra `networks` has.
"""

import importlib
import sys
from pathlib import Path

import light_install

from experiments import COMMANDS, __main__

TRAIN = {"network_flow", "train_resnet", "train_vgg", "train_small", "peel", "layers"}


def message(name):
    """Return the error of importing an experiment, "" if there is none."""
    try:
        importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def without_extras():
    sys.meta_path.insert(0, light_install.Hidden(light_install.EXTRAS))
    assert "ulpm_flow" in __main__.listing()
    for name in COMMANDS:
        text = message(name)
        assert text.startswith("PIL, jinja2, matplotlib, tensorboardX, tqdm not found"), (
            name
        )
        assert "pip install '.[experiments]'" in text
        assert "'.[all]'" in text


def without_networks(folder):
    sys.meta_path.insert(0, light_install.Hidden(light_install.NETWORKS))
    for name in COMMANDS:
        advice = "pip install 'ncjax[networks]'" if name in TRAIN else ""
        assert message(name).endswith(advice), name
        assert bool(message(name)) == (name in TRAIN), name
    from experiments import report

    results = Path(report.__file__).parents[1] / "results"
    runs = f"{results / 'train' / 'vgg13_kmnist'},{results / 'peel'}"
    report.run(report.Config(runs=runs, output=f"{folder}/page.html"))


if __name__ == "__main__":
    if sys.argv[1] == "none":
        without_extras()
    else:
        without_networks(sys.argv[2])
