"""Networks that are trained to collapse: Flax models, data sets, training, checkpoints.

Import what you need by name, such as `from ncjax.networks import models`. These modules
need the packages of `pip install 'ncjax[networks]'`; `import ncjax` loads none of them.
"""

from ncjax.checks import check_installed

check_installed(
    "networks",
    *("flax", "optax", "orbax.checkpoint", "tensorflow_datasets"),
    *("array_record", "importlib_resources", "PIL", "sklearn", "tqdm"),
)
