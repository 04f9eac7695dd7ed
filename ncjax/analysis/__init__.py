"""Analyse features and a classifier: metrics, a verdict in words, a table, a figure."""

from ncjax.analysis.result import Analysis as Analysis
from ncjax.analysis.result import analyze as analyze
