"""``python -m bert_decomp.export``."""

import sys

from .cli.command import command
from .exporting.export import main

if __name__ == "__main__":
    sys.exit(command(main))
