"""YAML files of others, read within bounds: of size, of depth, and of what they may hold, which is
what JSON can hold. Aliases are refused: a few lines of them stand for billions of values."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from llmq.storage.boundary import reading
from llmq.storage.json_files import MAX_DEPTH, read_bytes

MAX_BYTES = 256 << 10  # a second or two of parsing
_JSON_TYPES = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader without aliases, deep nesting and doubled keys."""

    depth = 0

    def fetch_alias(self) -> None:
        raise ValueError(
            f"line {self.line + 1}: what begins with * is an alias, which is not read; a pattern "
            "needs quotes"
        )

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"{line}: keys are text")
            if key.value in seen:
                raise ValueError(f"{line}: key {key.value!r} appears twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for text, because it has no point.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(
    path: str | os.PathLike[str], what: str, remedy: str, *, max_bytes: int = MAX_BYTES
) -> Any:
    """The value of the one document in a YAML file. what: what the file should be, such as "a
    recipe". Raises `LlmqError` that names the file for anything but a regular file of at most
    `max_bytes` with objects that have text as keys, lists, text, numbers, true, false and null,
    nested at most `MAX_DEPTH` deep."""
    data = read_bytes(path, what, remedy, max_bytes)
    with reading(os.fspath(path), f"not {what}: no YAML", remedy):
        value = parse_yaml(data)
        _check_types(value)
    return value


def parse_yaml(data: bytes | str) -> Any:
    """The value of one document, which may hold dates, too. Raises `ValueError` or `YAMLError` for
    aliases, deep nesting, keys that are no text, and what is no YAML."""
    return yaml.load(data, _Loader)


def _check_types(value: Any) -> None:
    """Raise `ValueError` for what JSON has not, such as dates."""
    if isinstance(value, dict):
        for child in value.values():
            _check_types(child)
    elif isinstance(value, list):
        for child in value:
            _check_types(child)
    elif not isinstance(value, _JSON_TYPES):
        raise ValueError(f"{value!r} is of type {type(value).__name__}; put text in quotes")
