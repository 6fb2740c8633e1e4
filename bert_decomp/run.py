"""``python -m bert_decomp.run``: the same as ``lowrank-bert compress``."""

import sys

from .cli.command import command
from .cli.compress import main

if __name__ == "__main__":
    sys.exit(command(main))
