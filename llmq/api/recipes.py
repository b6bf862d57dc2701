"""A recipe as an argument: a `Recipe`, or texts in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PretrainedConfig

from llmq.arguments import refused
from llmq.errors import LlmqError
from llmq.grid.scheme import parse_treatment
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.ptq.sizing import windows_for
from llmq.recipe import Recipe, Rule
from llmq.recipes.files import YAML, read_recipe_file, ready_names

RecipeLike: TypeAlias = Recipe | QuantSpec | str | Sequence[str | Rule | QuantSpec]
DEFAULT = "w4g128"
_FORMS = (
    "a Recipe, a QuantSpec, a text such as w4g128, W4A16 or '*.down_proj=w8', a list of these "
    "texts, or the name of a recipe or its file"
)


def recipe_of(recipe: RecipeLike, config: PretrainedConfig, **options: Any) -> Recipe:
    """The recipe that an argument stands for. Rules go before the one spec or scheme, wherever it
    stands; without one the other layers become w4g128, as on the command line.

    config: of the model, which decides how much text is read where the recipe does not say it.
    options: fields that override it where they are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(recipe, Recipe):
        return recipe.changed(**given)
    windows = windows_for(config)
    sizes = {"samples": windows.n_sequences, "sequence_length": windows.length}
    if isinstance(recipe, str) and (recipe in ready_names() or recipe.endswith((*YAML, ".json"))):
        stored = read_recipe_file(recipe).for_quantize()
        return Recipe.from_json(sizes | stored).changed(**given)
    parts = [recipe] if isinstance(recipe, str | QuantSpec) else recipe
    if not isinstance(parts, list | tuple):
        raise refused("recipe", recipe, _FORMS)
    rules, activations = _read(parts)
    return Recipe(**{"rules": rules, "activations": activations, **sizes, **given})


def _read(parts: Sequence[Any]) -> tuple[tuple[Rule, ...], ActSpec]:
    """The rules of texts, and the activations of their scheme."""
    rules: list[Rule] = []
    treatments: list[tuple[QuantSpec, ActSpec]] = []
    for part in parts:
        if isinstance(part, Rule):
            rules.append(part)
        elif isinstance(part, QuantSpec):
            treatments.append((part, ActSpec()))
        elif not isinstance(part, str):
            raise refused("recipe", part, _FORMS)
        elif "=" in part:
            rules.append(Rule.parse(part))
        else:
            treatments.append(parse_treatment(part))
    if len(treatments) > 1:
        raise LlmqError(
            f"recipe: {len(treatments)} specs for all layers; give one, and rules such as "
            "'*.down_proj=w8' for others"
        )
    if not treatments:
        treatments = [parse_treatment(DEFAULT)]
    weights, activations = treatments[0]
    if not any(rule.pattern == "*" for rule in rules):
        rules.append(Rule("*", weights))
    return tuple(rules), activations
