"""Timings of ncjax against its peers, each run in one process."""
