"""Prints the sizes of two data sets that name no folder, and if TensorFlow is loaded."""

import sys

from ncjax.networks import data

sizes = [len(data.load("mnist", "test", folder).labels) for folder in (None, "")]
print(sizes, "tensorflow" in sys.modules)
