"""Time ncjax against its peers, within one process."""
