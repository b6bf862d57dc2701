"""What would become of a model, as far as its config and the names of its tensors say it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.formats.registry import NAMES, choose_format
from llmq.models.arch import FAMILIES, quantizable_layers, tower_parameters
from llmq.models.keep import is_extra_layer
from llmq.models.processors import refusal_of_pictures
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.recipe import LayerPlan, Recipe

HOLDS = "holds all of it"


@dataclass(frozen=True)
class Prospect:
    """refusal: why the model cannot be quantized, None where it can; then the rest is empty.
    quantized: names of layers. kept: names of layers by the reason. towers: where the parts of a
    wrapper begin that text does not come by. extra: stored tensors of layers that the class does
    not load. share: of the weights of the blocks that are quantized. formats: by name, `HOLDS` or
    why not. remarks: see `StoredModel.remarks`."""

    model_type: str
    model_class: str = ""
    is_tested: bool = False
    refusal: str | None = None
    quantized: tuple[str, ...] = ()
    kept: dict[str, list[str]] = field(default_factory=dict)
    towers: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    share: float = 0.0
    formats: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "class": self.model_class,
            "tested": self.is_tested,
            "refusal": self.refusal,
            "quantized": list(self.quantized),
            "kept": self.kept,
            "towers": list(self.towers),
            "extra_tensors": list(self.extra),
            "share_of_blocks": round(self.share, 6),
            "formats": self.formats,
            "notes": self.remarks,
        }


def prospect(source: Source, recipe: Recipe) -> Prospect:
    """What `quantize` would do with a model, without reading a weight. Nothing is raised for a
    model that cannot be quantized: the reason is the result."""
    model_type = str(source.stated.get("model_type"))
    try:
        stored = StoredModel.of(source)
        plans = recipe.plan(quantizable_layers(stored.skeleton))
        stored.check()
        remarks = stored.remarks()
        if reason := refusal_of_pictures(stored.skeleton):
            remarks["pictures"] = reason
    except LlmqError as error:
        return Prospect(model_type, refusal=str(error))
    text_type = stored.config.get_text_config().model_type
    return Prospect(
        model_type=model_type,
        model_class=type(stored.skeleton).__name__,
        is_tested=text_type in FAMILIES and FAMILIES[text_type].is_tested,
        quantized=tuple(plan.layer.name for plan in plans if plan.spec is not None),
        kept=_kept(plans),
        towers=_towers(stored.skeleton),
        extra=tuple(name for name in stored.others if is_extra_layer(name, stored.config)),
        share=_share(stored.skeleton, plans),
        formats={name: _holds(name, plans, recipe) for name in NAMES},
        remarks=remarks,
    )


def _kept(plans: list[LayerPlan]) -> dict[str, list[str]]:
    kept: dict[str, list[str]] = {}
    for plan in plans:
        if plan.spec is None:
            kept.setdefault(plan.note or "a rule keeps it", []).append(plan.layer.name)
    return kept


def _share(model: PreTrainedModel, plans: list[LayerPlan]) -> float:
    """Of the weights of the linear layers of the blocks."""
    sizes = [(plan.spec is not None, plan.layer.shape[0] * plan.layer.shape[1]) for plan in plans]
    return sum(size for is_quantized, size in sizes if is_quantized) / sum(n for _, n in sizes)


def _towers(model: PreTrainedModel) -> tuple[str, ...]:
    """The first part of their names that no parameter of the text model begins with."""
    towers = tower_parameters(model)
    text = [name for name, _ in model.named_parameters() if name not in towers]
    starts = {start for name in text for start in _starts(name)}
    found = {next(each for each in _starts(name) if each not in starts) for name in towers}
    return tuple(sorted(found))


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _holds(name: str, plans: list[LayerPlan], recipe: Recipe) -> str:
    try:
        choose_format(name, plans, recipe.activations, act_order=recipe.order == "act")
    except LlmqError as error:
        return str(error)
    return HOLDS
