"""Run folders, command line and report page; knows nothing of neural collapse."""

import importlib.util

_PACKAGES = ("PIL", "absl", "jinja2", "matplotlib", "tensorboardX", "tqdm")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


if _missing := [package for package in _PACKAGES if not _is_installed(package)]:
    raise ModuleNotFoundError(
        f"{', '.join(_missing)} not found: pip install 'ncjax[experiments]', in the clone "
        "pip install '.[experiments]'; to train networks, for peel and layers '.[all]'",
        name=_missing[0],
    )
