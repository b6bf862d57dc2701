"""Arguments of Python functions: one of a wrong type is refused by its name."""

from __future__ import annotations

from typing import Any

from llmq.errors import LlmqError


def refused(name: str, value: Any, expected: str) -> LlmqError:
    """The error for an argument: what was expected, and what came."""
    came = type(value).__name__
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        came = text if len(text) <= 60 else f"{came} of {len(text)} characters"
    return LlmqError(f"{name}: expected {expected}, got {came}")


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise `LlmqError` for a value that is none of these. True and false are no whole numbers."""
    is_bool_by_chance = isinstance(value, bool) and kinds is int
    if not isinstance(value, kinds) or is_bool_by_chance:
        raise refused(name, value, expected)
