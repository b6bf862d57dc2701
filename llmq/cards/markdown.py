"""Text and tables as Markdown that shows what it was given: names of files and texts may hold
anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmq.messages import one_line

_ESCAPED = str.maketrans({mark: f"\\{mark}" for mark in "\\|<>[]*_`"})


def plain(text: object) -> str:
    """One line that no character of makes a table, a link or HTML."""
    return one_line(text).translate(_ESCAPED)


def code(text: object) -> str:
    """One line as code."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """header, rows: cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(values: Mapping[str, str]) -> str:
    """A table of names and values without a header."""
    return table(["", ""], [[name, value] for name, value in values.items()])
