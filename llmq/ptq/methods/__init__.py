"""The methods by name. A method is one file with a `METHOD` and one line here. Transforms stand
before it: `smoothquant+gptq`.

Nothing heavy is imported: the command line reads this for `--help`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmq.errors import LlmqError
from llmq.messages import did_you_mean
from llmq.ptq.transforms import TRANSFORMS

if TYPE_CHECKING:
    from llmq.ptq.methods.base import Method
    from llmq.recipe import Recipe

METHODS = {
    "rtn": "plain rounding, without text",
    "hqq": "scales fitted to the weights alone, without text",
    "gptq": "solved layer by layer on calibration text",
    "blockwise": "GPTQ, then blocks and all scales are trained; best, in 5 to 6 times the time",
}


def split_name(name: str) -> tuple[list[str], str]:
    """The transforms and the method of a name such as `smoothquant+gptq`. Raises `LlmqError` with
    the names that exist."""
    *transforms, method = name.split("+")
    if method not in METHODS:
        *names, last = METHODS
        hint = did_you_mean(method, METHODS)
        if method in TRANSFORMS:
            hint = f", which comes before a method: {name}+gptq"
        raise LlmqError(f"expected the method {', '.join(names)} or {last}, got {method!r}{hint}")
    for transform in transforms:
        if transform not in TRANSFORMS:
            raise LlmqError(
                f"method {name!r}: unknown transform {transform!r} before {method}; expected "
                f"{' or '.join(TRANSFORMS)}"
            )
    if len(set(transforms)) < len(transforms):
        raise LlmqError(f"method {name!r}: expected each transform once")
    return transforms, method


def method_named(name: str) -> Method:
    """The method of that name, transforms aside. Raises `LlmqError` with the names that exist."""
    _, name = split_name(name)
    method: Method = import_module(f"{__name__}.{name}").METHOD
    return method


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe. Raises `LlmqError` for keys that do not go with it."""
    method = method_named(recipe.method)
    method.check(recipe)
    if recipe.token_weights != "equal" and not method.needs(recipe).hessian:
        raise LlmqError(
            f"token weights {recipe.token_weights} (--token-weights) are of the Hessian, which "
            f"method {recipe.method} does without; use --method gptq, or leave them out"
        )
    return method


def needs_text(recipe: Recipe) -> bool:
    """Whether calibration text is read; rounding needs it for static activation ranges, and for
    transforms."""
    is_needed = method_of(recipe).needs(recipe).text or bool(split_name(recipe.method)[0])
    return is_needed or recipe.activations.kind == "int8-static"
