"""Experiments of ncjax: `python -m experiments` lists them."""
