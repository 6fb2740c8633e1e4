"""``lowrank-bert``: one program with a subcommand for each job."""

from __future__ import annotations

import importlib
import sys

from ..errors import UserError
from .command import command

# Subcommands are modules of this package; only the one that runs is imported.
COMMANDS = {
    "compress": "decompose, distil, evaluate, measure and report",
    "evaluate": "metrics of a saved model on a task or a file",
    "export": "write a saved model for another runtime",
    "serve": "a model behind HTTP",
    "predict": "what a model says of every text of a file",
    "report": "make a run's report pages again",
}
USAGE = "usage: lowrank-bert COMMAND [options]\n\ncommands:\n" + "\n".join(
    f"  {name:<10} {text}" for name, text in COMMANDS.items()
)


def main(argv: list[str]) -> None:
    """Run the subcommand that ``argv`` begins with.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nlowrank-bert COMMAND --help lists a command's options.")
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    importlib.import_module(f".{name}", __package__).main(rest)


def entry() -> None:
    """The console script."""
    sys.exit(command(main))
