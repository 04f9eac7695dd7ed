"""Runs on disk and on the command line; nothing here knows of neural collapse."""
