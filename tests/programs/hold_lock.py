"""Holds the lock of the folder given until its standard input ends."""

import sys
from pathlib import Path

from experiments._runs import lock

with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
