"""``python -m bert_decomp.evaluate``."""

import sys

from .cli.command import command
from .cli.evaluate import main

if __name__ == "__main__":
    sys.exit(command(main))
