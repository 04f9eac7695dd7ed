"""What runs here: versions, device, optional packages."""

import importlib.metadata
import subprocess
from functools import partial

import jax

from benchmarks._accelerator_checks import Check, Finding, Setting, Skipped
from benchmarks._accelerator_timing import memory_rate, product_rate
from experiments._runs import folders

_PACKAGES = ("flax", "optax", "equinox", "orbax-checkpoint", "scipy")
_OPTIONAL = ("torch", "torchvision", "tensorflow-datasets", "scikit-learn", "hypothesis")
_QUERY = "--query-gpu=name,driver_version,memory.total"


def checks(setting: Setting) -> list[Check]:
    """Return the checks of the environment."""
    size = 256 if setting.tiny else 8192
    return [
        Check("versions", _versions, accelerator=False),
        Check("optional packages", _optional, accelerator=False),
        Check("device", partial(_device, setting.tiny), accelerator=False),
        Check("driver", _driver),
        *(
            Check(f"matrix product, {size}, {dtype}", partial(_peak, dtype, size))
            for dtype in ("bfloat16", "float32", "float64")
        ),
        Check("copy of an array", partial(_copy, 2**16 if setting.tiny else 2**31)),
    ]


def _versions() -> Finding:
    known = folders.provenance(*_PACKAGES)
    return Finding(True, known["versions"]["jax"], "JAX", known["versions"])


def _optional() -> Finding:
    found = {name: _version(name) for name in _OPTIONAL}
    present = sum(version != "missing" for version in found.values())
    return Finding(True, present, f"of {len(found)}", found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device(tiny: bool) -> Finding:
    device = jax.devices()[0]
    details = {"devices": jax.device_count(), "platform": device.platform}
    if device.platform == "cpu":
        details["note"] = (
            "no accelerator: a dry run"
            if tiny
            else "no accelerator: install JAX for one, or give --tiny for a dry run"
        )
    return Finding(tiny or device.platform != "cpu", device.device_kind, "", details)


def _driver() -> Finding:
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        raise Skipped("there is no nvidia-smi here") from None
    return Finding(done.returncode == 0, done.stdout.strip().replace("\n", "; "))


def _peak(dtype: str, size: int) -> Finding:
    return Finding(True, product_rate(dtype, size) / 1e12, "TFLOP/s")


def _copy(size: int) -> Finding:
    return Finding(True, memory_rate(size) / 1e9, "GB/s", {"bytes": 2 * size})
