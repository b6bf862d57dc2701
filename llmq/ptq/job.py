"""What a run is, before anything is computed: the model, what becomes of each of its layers, the
format and the text, and every check that can be made by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.formats.base import Format
from llmq.formats.engine_rules import Result
from llmq.formats.engines import readings, refused_by
from llmq.formats.registry import (
    AUTO,
    choose_format,
    format_named,
    has_groups,
    known_format,
    result_of,
)
from llmq.formats.requantizing import full_precision
from llmq.formats.unheld import kept_where_unheld
from llmq.grid.spec import QuantSpec
from llmq.inference.settings import read_settings
from llmq.models.arch import quantizable_layers
from llmq.models.experts import unfused_in
from llmq.models.low_precision import kind_of
from llmq.models.readers import CheckpointReader, weight_reader
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.ptq.calibration import read_calibration
from llmq.ptq.group_sizes import with_one_group_size
from llmq.ptq.methods import method_of
from llmq.ptq.outside import fitting_outside, plan_outside
from llmq.ptq.precision import Precision
from llmq.ptq.scales import fitting_plans
from llmq.recipe import LayerPlan, Recipe
from llmq.text import documents
from llmq_kernels.core import restricted

_NEAR = "within 1/256 of its value"  # what rounding to 8 digits is off by, at most


@dataclass(frozen=True)
class Job:
    """Everything known before anything is computed. config, model: what the stored tensors are, on
    the meta device. tokens: None for methods without data. remarks: what is to be known of the
    model or the text. outside: embeddings and head, where they are quantized. n_others: numbers
    in stored tensors that the model has no place for, which are copied. stored: the names that
    layers are stored under, where they are others than those of the model."""

    source: Source
    config: PretrainedConfig
    model: PreTrainedModel
    recipe: Recipe
    plans: list[LayerPlan]
    fmt: Format
    tokens: documents.TokenSet | None
    remarks: dict[str, str]
    outside: tuple[LayerPlan, ...] = ()
    n_others: int = 0
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_plans(self) -> list[LayerPlan]:
        """Of the layers of the blocks, and of what lies outside."""
        return [*self.plans, *self.outside]

    @property
    def notes(self) -> dict[str, str]:
        """Layers that differ from what was asked, and the remarks."""
        notes = {plan.layer.name: plan.note for plan in self.all_plans if plan.note}
        if told := refused_by(self.result):
            notes[f"format {self.fmt.name}"] = told
        return notes | self.remarks

    @property
    def result(self) -> Result:
        """What is asked of other engines."""
        is_ordered = self.recipe.order == "act"
        return result_of(
            self.fmt,
            self.all_plans,
            self.recipe.activations,
            act_order=is_ordered,
            stored=self.stored,
        )

    def planned_bytes(self, plan: LayerPlan) -> int:
        """What a layer that is quantized takes in the format."""
        assert plan.spec is not None
        return self.bytes_of(plan.spec, plan.layer.shape, plan.role)

    def bytes_of(self, spec: QuantSpec, shape: tuple[int, int], role: str = "") -> int:
        """What a layer with that spec takes, see `Format.layer_bytes`. role: see `LayerPlan`."""
        is_ordered = self.recipe.order == "act" and not role
        return self.fmt.for_role(role).layer_bytes(spec, shape, act_order=is_ordered)

    def precision(self, device: str) -> Precision:
        """What the parts of the run are computed in on a device."""
        return Precision.of(self.config, self.recipe, device)


def prepare(
    model: str | Source,
    recipe: Recipe,
    *,
    calibration: str | documents.TokenSet | None = None,
    format: str = "auto",
    revision: str | None = None,
    strict: bool = False,
    check_scales: bool = True,
    for_budget: bool = False,
    device: str = "cpu",
    on_text: Callable[[int, int], None] = lambda done, total: None,
    held_out: bool = True,
    allow_requantize: bool = False,
) -> Job:
    """Resolve and check everything that can be checked before computing: model, names of all
    tensors, rules, format, calibration text. Raises `LlmqError`.

    calibration: where the text is, or windows of tokens that are there already; None: the recipe's,
    or else that of `sizing.default_text`. check_scales: read
    the weights of all layers once, to give each a scale dtype that holds its scales; without, what
    is planned is float16 as it was asked for, and text of the model's own is not written but has
    its shape alone. for_budget: layers whose bits a budget chooses get their specs later, and with
    these their scale dtypes. device: where text is written. on_text: told how many windows of it
    are, of how many. held_out: measure the result on text that is not calibrated on.
    allow_requantize: take a folder of packed codes for the model that they stand for.
    """
    restricted.adapt()
    method_of(recipe)  # or it is refused before anything is read
    source = full_precision(Source.open(model, revision), allow_requantize)
    read_settings(source.folder)  # it comes along, and the result has to load
    stored = StoredModel.of(source)
    plans, outside, fmt = _planned(
        *(source, stored, recipe, format), check_scales=check_scales, for_budget=for_budget
    )
    every = [*plans, *outside]
    if strict:
        check_unchanged(every)
    remarks = stored.remarks(strict) | _remarks_on_precision(source, stored, every)
    text = read_calibration(
        *(source, stored, recipe, calibration),
        held_out=held_out,
        device=device,
        on_text=on_text if check_scales else None,
    )
    recipe, tokens = text.recipe, text.tokens
    remarks |= text.remarks
    if recipe.token_weights != "equal" and unfused_in(stored.skeleton):
        remarks["token weights"] = "not for experts, whose tokens all count alike"
    n_others = sum(prod(source.tensors.shapes[name]) for name in stored.others)
    return Job(
        source=source,
        config=stored.config,
        model=stored.skeleton,
        recipe=recipe,
        plans=plans,
        fmt=fmt,
        tokens=tokens,
        remarks=remarks,
        outside=tuple(outside),
        n_others=n_others,
        stored=_other_names(stored),
    )


def _planned(
    source: Source,
    stored: StoredModel,
    recipe: Recipe,
    format: str,
    *,
    check_scales: bool,
    for_budget: bool,
) -> tuple[list[LayerPlan], list[LayerPlan], Format]:
    """What becomes of every linear layer, of embeddings and head, and the format that holds it."""
    plans = recipe.plan(quantizable_layers(stored.skeleton))
    if format != AUTO and known_format(format).one_group_size:
        plans = with_one_group_size(plans, recipe)
    if format != AUTO:
        plans = kept_where_unheld(known_format(format), plans)
    outside = plan_outside(stored.skeleton, recipe)
    if not any(plan.spec for plan in plans):
        raise LlmqError(
            f"none of the {len(plans)} linear layers would be quantized; see 'llmq plan' with the "
            "same options"
        )
    stored.check()
    is_ordered = recipe.order == "act"
    if is_ordered and format == AUTO and has_groups(plans):
        raise _unnamed_format(plans, recipe)
    # or it is refused before weights are read
    choose_format(format, [*plans, *outside], recipe.activations, act_order=is_ordered)
    if check_scales:
        reader = CheckpointReader(stored.skeleton, source.tensors)
        weight_of = weight_reader(stored.skeleton, reader)
        later = {plan.layer.name for plan in plans if for_budget and recipe.takes_part(plan)}
        plans, _ = fitting_plans(plans, weight_of, later)
        outside = fitting_outside(outside, weight_of)
    every = [*plans, *outside]
    return plans, outside, choose_format(format, every, recipe.activations, act_order=is_ordered)


def _other_names(stored: StoredModel) -> dict[str, str]:
    """Names of layers -> those that they are stored under, where these are others."""
    weights = {
        name.removesuffix(".weight"): its.removesuffix(".weight")
        for name, its in stored.names.items()
        if name.endswith(".weight")
    }
    return {name: its for name, its in weights.items() if its != name}


def _unnamed_format(plans: list[LayerPlan], recipe: Recipe) -> LlmqError:
    """Columns in another order than that of their groups are read by few: whoever wants them says
    for whom."""
    result = result_of(format_named("gptq"), plans, recipe.activations, act_order=True)
    names: dict[bool, list[str]] = {True: [], False: []}
    for reading in readings(result):
        names[reading.reads].append(reading.engine)
    return LlmqError(
        f"--act-order: {', '.join(names[False])} do not read the order of columns that it stores; "
        f"name the format: --format gptq for {', '.join(names[True])}, or --format llmq"
    )


def _remarks_on_precision(
    source: Source, stored: StoredModel, plans: list[LayerPlan]
) -> dict[str, str]:
    """What a source is that stores its weights in few bits, and what becomes of those that are
    kept."""
    kinds = source.precision
    if not kinds:
        return {}
    listed = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    remarks = {"source": f"{listed}; decoded to bfloat16 while it is read"}
    quantized = {f"{plan.layer.name}.weight" for plan in plans if plan.spec is not None}
    tensors = source.tensors
    kept = [
        name
        for name, its in stored.names.items()
        if name not in quantized and kind_of(tensors, its) is not None
    ]
    if kept:
        remarks["kept weights"] = (
            f"{len(kept)} are stored in fewer bits, the first being {kept[0]} "
            f"({kind_of(tensors, stored.names[kept[0]])}), and are written as bfloat16, each "
            f"{_NEAR}"
        )
    if decoded := [name for name in stored.others if kind_of(tensors, name) is not None]:
        remarks["copied weights"] = (
            f"{len(decoded)} that {type(stored.skeleton).__name__} does not load are stored in "
            f"fewer bits, the first being {decoded[0]} ({kind_of(tensors, decoded[0])}), and are "
            f"written as bfloat16, each {_NEAR}"
        )
    return remarks


def check_unchanged(plans: list[LayerPlan]) -> None:
    """Under --strict: every layer becomes what was asked."""
    notes = [f"{plan.layer.name}: {plan.note}" for plan in plans if plan.differs]
    if notes:
        raise LlmqError(
            f"--strict: {len(notes)} layers would differ from what was asked, the first being "
            f"{notes[0]}"
        )
