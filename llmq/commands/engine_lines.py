"""Which engines read a result, in lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from llmq.messages import one_line

WIDTH = 80


def engine_lines(engines: Sequence[dict[str, Any]]) -> str:
    """Those that read it first, then each that does not with its reason. engines: as
    `llmq.formats.engines.Reading.to_json` gives them."""
    reading = ", ".join(_name(engine) for engine in engines if engine["reads"])
    lines = [_wrapped(f"read by      {reading}", 13)]
    title = "not read by"
    for engine in engines:
        if not engine["reads"]:
            lines.append(_wrapped(f"{title:13}{_name(engine)}: {one_line(engine['reason'])}", 15))
            title = ""
    return "\n".join(lines)


def _name(engine: dict[str, Any]) -> str:
    return str(engine["engine"])


def _wrapped(text: str, indent: int) -> str:
    lines = textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return "\n".join(lines)
