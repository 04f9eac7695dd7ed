"""Runs in the folder given while the kernel refuses files above each size, then goes on."""

import resource
import sys
from pathlib import Path

import damage
import jax
import pytest

jax.config.update("jax_enable_x64", True)
with pytest.MonkeyPatch.context() as patch:
    damage.stand_in(patch)
    for limit in map(int, sys.argv[2:]):
        folder = Path(sys.argv[1]) / str(limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            damage.run("train_small", folder)
        except OSError as error:
            print(f"refused: {error}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        flag = "resume" if (folder / "config.json").exists() else "overwrite"
        damage.run("train_small", folder, **{flag: True})
