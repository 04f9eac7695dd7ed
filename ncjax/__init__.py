"""ncjax: the theory of neural collapse in JAX.

The unconstrained layer-peeled model of Ji, Lu, Zhang, Deng and Su (ICLR 2022) as pure
functions: losses, exact gradient flow, collapse metrics, curvature. Networks that are
trained to collapse live in `ncjax.networks`.

`import ncjax` loads no other module, not even JAX. Each name of `__init__.pyi` loads the
module that holds it when it is first used.
"""

import lazy_loader

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
# Modules that need the packages of an extra. Neither `from ncjax import *` nor an
# inspection of `dir(ncjax)` may load them.
_OF_EXTRAS = ("huggingface", "lightning", "networks", "nnx", "plotting", "torch")
__all__ = [name for name in _names if name not in _OF_EXTRAS]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
