"""The methods by name. A method is one file with a `METHOD` and one line here.

Nothing heavy is imported: the command line reads this for `--help`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.ptq.methods.base import Method
    from llmq.recipe import Recipe

METHODS = {
    "rtn": "plain rounding, without text",
    "gptq": "solved layer by layer on calibration text",
    "blockwise": "GPTQ, then every block is trained; best below 4 bits",
}


def method_named(name: str) -> Method:
    """The method of that name. Raises `LlmqError` with the names that exist."""
    if name not in METHODS:
        *names, last = METHODS
        raise LlmqError(f"unknown method {name!r}: expected {', '.join(names)} or {last}")
    method: Method = import_module(f"{__name__}.{name}").METHOD
    return method


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe. Raises `LlmqError` for keys that do not go with it."""
    method = method_named(recipe.method)
    method.check(recipe)
    return method


def needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read; rounding needs it for static activation ranges only."""
    return method_of(recipe).needs(recipe).text or recipe.activations.kind == "int8-static"
