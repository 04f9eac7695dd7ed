"""Prints which heavy packages are loaded after each step of using ncjax, as JSON."""

import contextlib
import io
import json
import sys

HEAVY = {
    *("jax", "numpy", "diffrax", "equinox", "optimistix", "scipy.optimize"),
    *("flax", "tensorflow_datasets", "orbax", "matplotlib", "tqdm", "torch"),
}


def loaded():
    """Return the heavy packages loaded so far."""
    return sorted(HEAVY & set(sys.modules))


def main():
    found = {}
    import ncjax

    found["import"] = loaded()
    from ncjax import command

    for argv in (["--help"], ["measure", "--help"], ["--version"], ["measure", "--Json"]):
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, contextlib.redirect_stderr(io.StringIO()):
            command.main(argv)
        found[" ".join(argv)] = loaded()
    import numpy as np

    means, labels = np.eye(3), np.arange(6) % 3
    ncjax.collapse_metrics_from_features(means[labels], labels, means)
    ncjax.losses.cross_entropy  # noqa: B018
    found["metrics"] = loaded()
    for name in dir(ncjax):
        getattr(ncjax, name)
    found["every name"] = loaded()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
