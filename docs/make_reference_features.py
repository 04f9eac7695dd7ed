"""Write the values, and from a run the features, of results/reference_features/.

    python docs/make_reference_features.py          # values.json
    python docs/make_reference_features.py RUN      # digits.npz and digits.json too

RUN is the folder of a run of `experiments.train_small`; digits.json names its command.
`docs/make_results.py` makes the table of docs/reference_features.md from values.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _training
from ncjax import conventions, statistics

FOLDER = Path(__file__).parents[1] / "results" / "reference_features"


def store_run(folder: Path) -> None:
    """Write the training features of a run in evaluation mode, and where they are from."""
    trained = _training.load_trained(folder)
    np.savez_compressed(
        FOLDER / "digits.npz",
        features=np.asarray(trained.features, np.float32),
        labels=np.asarray(trained.labels, np.int64),
        W=np.asarray(trained.weight, np.float32),
        b=np.asarray(trained.bias, np.float32),
    )
    config = json.loads((folder / "config.json").read_text())
    kept = ("command", "date", "versions", "device", "platform", "config")
    origin = {"epoch": trained.epoch} | {name: config[name] for name in kept}
    _write("digits.json", origin)


def values(name: str) -> dict[str, dict[str, float]]:
    """Return the numbers of every convention on a stored file, computed in float64."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = dict(stored)
    data = [arrays[key].astype(float) for key in ("features", "W", "b")]
    data.insert(1, arrays["labels"])
    ood: dict[str, Any] = {}
    if "ood_features" in arrays:
        labels = arrays["ood_labels"]
        seen = statistics.class_statistics(
            arrays["ood_features"], labels, int(labels.max()) + 1
        )
        ood = {"ood_mean": statistics.global_mean(seen)}
    return {
        convention: conventions.measure(
            convention, *data, **(ood if convention == "rhubarb" else {})
        )
        for convention in conventions.NAMES
    }


def _write(name: str, content: object) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    (FOLDER / name).write_text(text + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:]:
        store_run(Path(sys.argv[1]))
    _write("values.json", {name: values(name) for name in ("clusters", "digits")})
