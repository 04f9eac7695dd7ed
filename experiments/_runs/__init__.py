"""Run folders, command line and report page; knows nothing of neural collapse."""
