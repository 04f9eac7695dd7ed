"""What the core of ncjax does without the packages of its extras.

Run by `make dist` in an environment that holds the wheel alone, and by test_install.py
with the other packages hidden: `python tests/programs/light_install.py --hide`.
"""

import importlib.abc
import importlib.util
import sys
from functools import partial

NETWORKS = {"flax", "optax", "orbax", "tensorflow_datasets", "array_record", "sklearn"}
EXPERIMENTS = {"matplotlib", "jinja2", "tensorboardX"}
HOOKS = {"torch", "lightning", "transformers", "accelerate"}
EXTRAS = NETWORKS | EXPERIMENTS | HOOKS | {"PIL", "tqdm"}


class Hidden(importlib.abc.MetaPathFinder):
    """Finder that reports packages as not installed."""

    def __init__(self, packages):
        self._packages = packages

    def find_spec(self, fullname, path=None, target=None):
        """Raise ModuleNotFoundError for one of the packages."""
        if fullname.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def names_extra(extra, action):
    """Whether `action` fails with the command that installs the extra."""
    try:
        action()
    except ImportError as error:
        return f"pip install 'ncjax[{extra}]'" in str(error)
    return False


def main():
    if "--hide" in sys.argv:
        sys.meta_path.insert(0, Hidden(EXTRAS))
    import jax
    import numpy as np

    import ncjax

    jax.config.update("jax_enable_x64", True)
    assert not EXTRAS & {name.partition(".")[0] for name in sys.modules}
    start = ncjax.init_params(jax.random.key(0), num_classes=3, per_class=2, dim=4)
    flow = ncjax.gradient_flow(start, np.array([1.0, 100.0]))
    assert ncjax.collapse_metrics(flow.final).centred_self_duality < 0.01
    assert ncjax.certificate(flow.final).sigma_max < 1.1
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, flow.final, k=2, sphere=True)
    assert bool(eig.converged.all())
    features, labels = flow.final.H.reshape(6, 4), np.repeat(np.arange(3), 2)
    last = ncjax.collapse_metrics_from_features(features, labels, flow.final.W)
    assert last.accuracy == 1
    needs = {"networks": "networks", "plotting": "experiments", "nnx": "networks"}
    needs |= {hook: hook for hook in ("torch", "lightning", "huggingface")}
    for module, extra in needs.items():
        assert names_extra(extra, partial(importlib.import_module, f"ncjax.{module}"))
    loss = ncjax.log_cross_entropy
    for slow in (
        lambda: ncjax.hessian_eig(loss, start, method="lanczos", progress=True),
        lambda: ncjax.gradient_flow(start, [1.0], progress=True),
    ):
        assert names_extra("experiments", slow)
    print("import, flow, metrics, certificate and eigenvalues work without the extras")


if __name__ == "__main__":
    main()
