"""Prints as JSON the sums of several compilations and the files of programs after each.

The second finds the program on disk. Before each further one the file is damaged, in the
ways that the arguments name.
"""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments._runs import cli


def damage(path, how):
    content = path.read_bytes()
    cut = content[:100]
    flipped = content[:300] + bytes([content[300] ^ 1]) + content[301:]
    path.write_bytes({"cut": cut, "flipped": flipped}[how])


def total():
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sum(jnp.sin(x) ** 2 + jnp.cos(x) ** 2))(jnp.ones(3)))


def files():
    found = Path(os.environ["XDG_CACHE_HOME"]).rglob("jit__lambda-*")
    return {path: path.stat().st_mtime_ns for path in found}


warnings.showwarning = lambda message, *_args, **_settings: print(
    f"warning: {message}", file=sys.stderr
)
cli.set_up_jax()
sums, seen = [total()], [files()]
sums.append(total())
seen.append(files())
for how in sys.argv[1:]:
    for path in seen[-1]:
        damage(path, how)
    sums.append(total())
    seen.append(files())
changed = [before != after for before, after in itertools.pairwise(seen)]
print(json.dumps({"sums": sums, "files": list(map(len, seen)), "changed": changed}))
