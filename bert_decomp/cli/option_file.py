"""Options from a YAML or JSON file, turned into the words of a command line, whose parser then checks each type."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..io.json import parse_json, read_text

# Bytes of a file of options.
LIMIT = 2**20
# Text that can stand on a command line: no NUL, no half of a surrogate pair.
_PRINTABLE = re.compile("[^\0\ud800-\udfff]*")


def read_option_file(path: str) -> list[str]:
    """The options in a file, as a command line has them.

    Raises:
        UserError: the file is absent, malformed, or has values that no option has.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{path}: give options as --name value, or one .json, .yaml or .yml file")
    text = read_text(path, LIMIT)
    if suffix == ".json":
        values = parse_json(text, path)
    else:
        try:
            values = _YamlLoader(text).get_single_data()
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{path} is malformed: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold option names and values")
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in _words(path, name, value)
    ]


def _words(path: str, name: Any, value: Any) -> list[str]:
    if isinstance(value, dict):
        entries = [*value, *value.values()]
    else:
        entries = value if isinstance(value, list) else [value]
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or not all(
            isinstance(entry, (str, int, float)) and _PRINTABLE.fullmatch(str(entry))
            for entry in entries
        )
    ):
        raise UserError(
            f"{path} has {str(name)[:60]!r} with something else than a number, a text, true, false or a "
            "list of them"
        )
    if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
        raise UserError(f"{path} has {name} with a number that is not finite")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


class _YamlLoader(yaml.SafeLoader):
    """Plain values only, no duplicate key, and no aliases, by which a short text becomes an endless one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not for options")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(names):
            raise yaml.YAMLError("a name occurs twice")
        return super().construct_mapping(node, deep)
