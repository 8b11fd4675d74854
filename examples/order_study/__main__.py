"""Run the command line: `python examples/order_study`, or `python -m order_study` from within `examples`."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder: Python has put the folder itself on the path, where its modules would pass for
    # top-level ones. The folder above takes its place, so that the package is found under its own name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from order_study.cli import main

main(prog_name="order_study")
