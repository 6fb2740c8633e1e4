"""``python -m bert_decomp.evaluate``: the same as ``lowrank-bert evaluate``."""

import sys

from .cli.command import command
from .cli.evaluate import main

if __name__ == "__main__":
    sys.exit(command(main))
