"""`llmq doctor MODEL`: whether a model can be quantized, and what would become of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmq.commands import rendering
from llmq.messages import name_patterns

if TYPE_CHECKING:
    from llmq.ptq.prospect import Prospect


def examine(model: str) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text, for the default recipe. A folder with a config and
    no weights will do."""
    from llmq.models.config_only import ConfigOnly, open_to_plan
    from llmq.ptq.prospect import prospect
    from llmq.recipe import Recipe

    source = open_to_plan(model)
    found = prospect(source, Recipe())
    data = {
        "model": str(source.folder),
        "has_weights": not isinstance(source, ConfigOnly),
        **found.to_json(),
    }
    return data, _text(data, found)


def _text(data: dict[str, Any], found: Prospect) -> str:
    pairs: dict[str, object] = {"model": data["model"], "type": found.model_type}
    if found.refusal is not None:
        return rendering.render_pairs({**pairs, "cannot be quantized": found.refusal})
    tested = "run as a whole by llmq's tests" if found.is_tested else "not run by llmq's own tests"
    pairs["class"] = f"{found.model_class}, a family that is {tested}"
    if not data["has_weights"]:
        pairs["weights"] = "none in this folder: names are those that its config describes"
    pairs["quantized"] = (
        f"{len(found.quantized)} layers, {found.share:.2%} of the linear layers of the blocks: "
        f"{', '.join(name_patterns(found.quantized))}"
    )
    for i, (reason, names) in enumerate(found.kept.items()):
        patterns = ", ".join(name_patterns(names))
        pairs[f"kept {i + 1}"] = f"{len(names)} layers, {patterns}: {reason}"
    if found.towers:
        pairs["kept as stored"] = ", ".join(found.towers)
    if found.extra:
        pairs["copied as stored"] = (
            f"{len(found.extra)} tensors of layers that {found.model_class} does not load, the "
            f"first being {found.extra[0]}"
        )
    pairs |= {f"format {name}": reason for name, reason in found.formats.items()}
    pairs |= {f"note, {name}": note for name, note in found.remarks.items()}
    return rendering.render_pairs(pairs)
