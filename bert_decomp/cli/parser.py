"""Argument parsers whose complaint is one line, and the library's messages with flags in place of argument names."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from ..errors import UserError

WIDTH = 100


class HelpFormatter(argparse.HelpFormatter):
    """Options and their help side by side in ``WIDTH`` columns."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=WIDTH)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``UserError`` and names the nearest option for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(
            *args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs}
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own passes over output that cannot be written.
        (file or sys.stderr).write(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = self.parse_known_args(args, namespace)
        refuse_unknown(rest, self._option_string_actions)
        return namespace


def refuse_unknown(rest: list[str], known: Iterable[str]) -> None:
    """Raise UserError for arguments that no option takes, with the nearest name of ``known``.

    >>> refuse_unknown(["--rnak", "3"], ["--rank", "--seed"])
    Traceback (most recent call last):
    bert_decomp.errors.UserError: unknown options: --rnak (did you mean --rank?); --help lists the options
    """
    if not rest:
        return
    names = [part.partition("=")[0] for part in rest if part.startswith("--")]
    if not names:
        raise UserError(f"unexpected argument {rest[0]!r}; --help lists the options")
    known = [name for name in known if name.startswith("--")]
    parts = []
    for name in names:
        nearest = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        nearest = nearest or difflib.get_close_matches(name, known, 1)
        parts.append(f"{name} (did you mean {nearest[0]}?)" if nearest else name)
    raise UserError(f"unknown options: {', '.join(parts)}; --help lists the options")


# An argument's name: the first word of a message, or a word with an underscore, in neither case within a path or
# quotes.
_ARGUMENT = re.compile(r"(?:^[a-z]\w*|(?<![^\s(])[a-z]+_\w+)(?![\w/\\']|\.\w)")


def with_flags(message: str, names: Iterable[str]) -> str:
    """A message of the library, which names arguments, as one of the command line, which names flags.

    >>> with_flags("rank and encoder_fraction both set the size", {"rank", "encoder_fraction"})
    '--rank and --encoder_fraction both set the size'
    """
    known = set(names)
    return _ARGUMENT.sub(lambda match: f"--{match[0]}" if match[0] in known else match[0], message)


@contextlib.contextmanager
def flags_in_messages(names: Iterable[str]) -> Iterator[None]:
    """Let a ``UserError`` that leaves the block speak of flags where it names one of the arguments ``names``."""
    try:
        yield
    except UserError as error:
        raise UserError(with_flags(str(error), names)) from error
