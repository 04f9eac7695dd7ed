"""The provenance of a result: command, date, versions, device."""

import configparser
import datetime
import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax


def provenance(*extra_packages: str) -> dict[str, Any]:
    """Return command, date, device and versions, also of `extra_packages`."""
    packages = ("ncjax", "jax", "jaxlib", "diffrax", "numpy", *extra_packages)
    return {
        "command": " ".join(["python -m", module_name(), *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def module_name() -> str:
    """Return the module that `python -m` runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def version(package: str) -> str:
    """Return the version of an installed package, or of this clone, installed or not."""
    name, version = _clone()
    if package == name:
        return version
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _clone() -> tuple[str, str]:
    """Return name and version from the setup.cfg of the clone that holds this file."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    name, version = (
        settings.get("metadata", key, fallback="") for key in ("name", "version")
    )
    return name, version
