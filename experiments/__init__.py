"""Experiments of ncjax: `python -m experiments.NAME --help`."""
