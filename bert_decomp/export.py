"""``python -m bert_decomp.export``: the same as ``lowrank-bert export``."""

import sys

from .cli.command import command
from .cli.export import main

if __name__ == "__main__":
    sys.exit(command(main))
