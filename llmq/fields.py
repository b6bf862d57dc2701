"""Types of the fields of settings: they come from JSON, too, where a value can be of any type. A
float in the place of a whole number is refused, whatever its value: it was meant otherwise, and
JSON would keep it."""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmq.errors import LlmqError

_EXPECTED = {int: "a whole number", bool: "true or false", float: "a finite number", str: "a text"}


def check_fields(settings: Any, what: str = "") -> None:
    """Raise `LlmqError` for the first field of a dataclass whose value is not of the type that it
    is declared with: whole numbers, finite numbers, true or false, text, one of some words, or
    null. Fields of other types are not looked at. what: put before the field's name."""
    for name, hint in get_type_hints(type(settings)).items():
        check_value(getattr(settings, name), hint, f"{what}{name.replace('_', ' ')}")


def check_keys(data: Any, cls: type, path: str = "") -> None:
    """Raise `LlmqError` unless `data` is an object whose keys are fields of a dataclass and whose
    values are of their types, as far as `check_fields` looks. path: of the object, which the error
    names before the key: "phases.warmup"."""
    hints = get_type_hints(cls)
    known = ", ".join(hints)
    if not isinstance(data, dict):
        raise LlmqError(f"{path} {data!r}: expected an object with some of the keys {known}")
    if unknown := sorted(map(str, set(data) - set(hints))):
        where = f"{path}: " if path else ""
        raise LlmqError(f"{where}unknown keys {', '.join(unknown)}; known are {known}")
    for key, value in data.items():
        check_value(value, hints[key], f"{path}.{key}" if path else key)


def check_value(value: Any, hint: Any, name: str) -> None:
    """`check_fields` for one value."""
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return
        inner = [part for part in get_args(hint) if part is not NoneType]
        if len(inner) == 1:
            _check(value, inner[0], name, or_null=True)
        return
    _check(value, hint, name, or_null=False)


def _check(value: Any, hint: Any, name: str, or_null: bool) -> None:
    null = " or null" if or_null else ""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if not isinstance(value, str | int) or value not in choices:
            raise LlmqError(
                f"unknown {name} {value!r}: expected {', '.join(choices[:-1])} or "
                f"{choices[-1]}{null}"
            )
        return
    if hint not in _EXPECTED:
        return
    if hint is float:
        fits = type(value) in (int, float) and is_finite(value)
    else:
        fits = type(value) is hint
    if not fits:
        expected = "true, false" if hint is bool and or_null else _EXPECTED[hint]
        raise LlmqError(f"{name} {value!r}: expected {expected}{null}")


def is_finite(value: int | float) -> bool:
    """Whether a number is finite as a float; a whole number of 400 digits is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
