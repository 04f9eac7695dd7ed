"""Where a result comes from: command, date, versions, device."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax


def provenance(*others: str) -> dict[str, Any]:
    """Command, date, versions (of `others` too) and device of a run."""
    packages = ("ncjax", "jax", "jaxlib", "diffrax", "numpy", *others)
    return {
        "command": " ".join(["python -m", module_name(), *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
