"""Reading a recipe file: YAML, or JSON, or the report of an earlier run. Its keys are checked here,
by name and by type; whether their values make a recipe is the recipe's own business."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.fields import check_keys
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.recipe import Recipe
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_value
from llmq.storage.yaml_files import read_yaml

YAML = (".yaml", ".yml")
QAT = "qat"
_READY_DIR = Path(__file__).parent
_EXPECTED = "give a YAML or JSON file with the keys of llmq/recipes/README.md, or a report.json"


@dataclass(frozen=True)
class RecipeFile:
    """name: of the file, as it was given. recipe: the keys of a `Recipe`, checked for their types.
    qat: what the file holds for `llmq qat`, unchecked; None where it has no such section."""

    name: str
    recipe: dict[str, Any]
    qat: dict[str, Any] | None

    def for_quantize(self) -> dict[str, Any]:
        """The keys of a `Recipe`. Raises `LlmqError` for a file that is for `llmq qat` alone."""
        if not self.recipe and self.qat is not None:
            raise LlmqError(
                f"--recipe {self.name}: it has nothing but a section '{QAT}', which 'llmq qat' "
                "reads; 'llmq quantize' and 'llmq plan' need keys such as rules beside it"
            )
        return self.recipe

    def for_qat(self) -> dict[str, Any]:
        """The section of `llmq qat`. Raises `LlmqError` for a file without one."""
        if self.qat is None:
            raise LlmqError(
                f"--recipe {self.name}: it has no section '{QAT}', the only one that 'llmq qat' "
                f"reads; add one such as '{QAT}: {{scheme: w2}}'"
            )
        return self.qat


def ready_names() -> list[str]:
    """The names of the recipes that llmq brings."""
    return sorted(path.stem for path in _READY_DIR.glob("*.yaml"))


def read_recipe_file(name: str) -> RecipeFile:
    """The recipe file of a path or, first, of a ready recipe's name. Raises `LlmqError` that names
    the file and, by its path, the key."""
    try:
        data = _read(_path_of(name))
    except LlmqError as error:
        raise LlmqError(f"--recipe {error}") from None
    try:
        recipe, qat = _sections(data)
        check_keys(recipe, Recipe)
        if "activations" in recipe:
            check_keys(recipe["activations"], ActSpec, "activations")
    except LlmqError as error:
        raise LlmqError(f"--recipe {name}: {error}") from None
    return RecipeFile(name, recipe, qat)


def _sections(data: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a file holds for a `Recipe`, and for `llmq qat`."""
    if not isinstance(data, dict):
        raise LlmqError(f"not a recipe: expected an object, got {type(data).__name__}; {_EXPECTED}")
    if data.get("method") == QAT and "settings" in data:
        return {}, _section_of_report(data)
    if "recipe" in data:
        recipe = data["recipe"]
        if not isinstance(recipe, dict):
            raise LlmqError(f"not a recipe: what it holds under 'recipe' is no object; {_EXPECTED}")
        return recipe, None
    recipe = {key: value for key, value in data.items() if key != QAT}
    if QAT in data and not isinstance(data[QAT], dict):
        raise LlmqError(f"{QAT} {data[QAT]!r}: expected an object, such as {{scheme: w2}}")
    return recipe, data.get(QAT)


def _section_of_report(report: dict[str, Any]) -> dict[str, Any]:
    """What the report of `llmq qat` says: its settings, and a rule for each layer that has another
    spec than that of the scheme."""
    with reading("its settings and layers", "not those of a report of llmq qat", _EXPECTED):
        usual = str(QuantSpec.from_json(report["settings"]["scheme"]["weights"]))
        others = [layer for layer in report["layers"] if layer["spec"] != usual]
        rules = [[layer["name"], layer["spec"]] for layer in others]
        return {**report["settings"], "rules": rules}


def _path_of(name: str) -> str:
    """Where a recipe lies. A ready one goes before a file or folder of its name, which can be given
    as ./NAME."""
    if name in ready_names():
        return str(_READY_DIR / f"{name}.yaml")
    if os.path.lexists(name) or Path(name).suffix or len(Path(name).parts) > 1:
        return name
    raise LlmqError(
        f"{name}: not a recipe: no such file, and the ready ones are {', '.join(ready_names())}"
    )


def _read(path: str) -> Any:
    if path.endswith(YAML):
        return read_yaml(path, "a recipe", _EXPECTED)
    return read_value(path, "a recipe", _EXPECTED, unique_keys=True)
