"""Prints the heavy packages that `import ncjax` loads."""

import sys

import ncjax  # noqa: F401

HEAVY = {"flax", "tensorflow_datasets", "orbax", "matplotlib", "tqdm", "absl"}
print(sorted(HEAVY & set(sys.modules)))
