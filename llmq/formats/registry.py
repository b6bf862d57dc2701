"""The on-disk formats by name, in the order in which "auto" asks them, and the choice among them.

Nothing of a format is imported before it is needed, so that the command line can list the names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.formats.base import Format, Specs
    from llmq.formats.engine_rules import Result
    from llmq.grid.spec import ActSpec
    from llmq.recipe import LayerPlan

_HOMES = {
    "compressed-tensors": "llmq.formats.compressed:COMPRESSED",
    "gptq": "llmq.formats.gptq:GPTQ_V1",
    "gptq_v2": "llmq.formats.gptq:GPTQ_V2",
    "bitnet": "llmq.formats.bitnet:BITNET",
    "awq": "llmq.formats.awq:AWQ",
    "llmq": "llmq.formats.native:NATIVE",
}
NAMES = tuple(_HOMES)
AUTO = "auto"
_NO_COLUMNS = "its readers know linear layers, and this one multiplies with a transposed weight"
_ELSE = "Use --format llmq, which holds everything"


@cache
def format_named(name: str) -> Format:
    """A format by name. Raises `KeyError` for a name that is not in `NAMES`."""
    module, _, attribute = _HOMES[name].partition(":")
    fmt: Format = getattr(import_module(module), attribute)
    return fmt


def known_format(name: str, *others: str) -> Format:
    """A format by a name that comes from outside. others: words that would do as well. Raises
    `LlmqError` for a name that is not in `NAMES`."""
    if name not in NAMES:
        expected = ", ".join((*others, *NAMES))
        raise LlmqError(f"format {name!r}: expected one of {expected}")
    return format_named(name)


def all_formats() -> list[Format]:
    """Every format, in the order of `NAMES`."""
    return [format_named(name) for name in NAMES]


def detect(settings: dict[str, Any]) -> Format | None:
    """The format of a folder whose config.json has this `quantization_config`, or None."""
    return next((fmt for fmt in all_formats() if fmt.detects(settings)), None)


def choose_format(
    name: str,
    plans: list[LayerPlan],
    activations: ActSpec | None = None,
    *,
    act_order: bool = False,
) -> Format:
    """The format by name; "auto" takes the first that holds every layer exactly and that other
    engines load, else llmq's own. act_order: columns are not in the order of their groups. Raises
    `LlmqError` when the named one cannot hold a layer."""
    from llmq.grid.spec import ActSpec

    activations = activations or ActSpec()
    if name == AUTO:
        return _first_choice(plans, activations, act_order=act_order)
    fmt = known_format(name, AUTO)
    if reason := fmt.refusal_of_activations(activations):
        raise LlmqError(f"format {name}: {reason}. {_ELSE}")
    if act_order and not fmt.has_order and has_groups(plans):
        raise LlmqError(f"format {name}: it stores no order of columns (act-order). {_ELSE}")
    if not fmt.has_columns and (found := _transposed(plans)):
        raise LlmqError(f"format {name} cannot hold {found}: {_NO_COLUMNS}. {_ELSE}")
    for plan in plans:
        if plan.spec is None:
            continue
        if reason := _refusal(fmt, plan):
            what = plan.note or plan.spec
            raise LlmqError(
                f"format {name} cannot hold {plan.layer.name} ({what}): {reason}. {_ELSE}"
            )
    if reason := fmt.refusal_of_model(_specs(plans)):
        raise LlmqError(f"format {name} cannot hold this model: {reason}. {_ELSE}")
    return fmt.given(activations)


def has_groups(plans: list[LayerPlan]) -> bool:
    """Whether some layer has more than one group of columns, so that their order shows."""
    return any(
        plan.spec is not None and plan.spec.n_groups(plan.layer.shape[1]) > 1 for plan in plans
    )


def result_of(
    fmt: Format,
    plans: list[LayerPlan],
    activations: ActSpec,
    *,
    act_order: bool = False,
    stored: Mapping[str, str] | None = None,
) -> Result:
    """What engines are asked about, of a model that is written in a format. stored: the names of
    layers in the result, where they are others than those of the model."""
    from llmq.formats.engine_rules import Result

    implied, names = fmt.activations or activations, stored or {}
    specs = {names.get(name, name): spec for name, spec in _specs(plans).items()}
    return Result(fmt.name, specs, implied, act_order and has_groups(plans))


def _first_choice(plans: list[LayerPlan], activations: ActSpec, *, act_order: bool) -> Format:
    specs = _specs(plans)
    is_ordered = act_order and has_groups(plans)
    for fmt in all_formats():
        if is_ordered and not fmt.has_order:
            continue
        if fmt.is_first_choice(specs) and _holds(fmt, plans, activations):
            return fmt.given(activations)
    raise AssertionError("llmq's own format holds everything")


def _holds(fmt: Format, plans: list[LayerPlan], activations: ActSpec) -> bool:
    if fmt.refusal_of_activations(activations) or fmt.refusal_of_model(_specs(plans)):
        return False
    if not fmt.has_columns and _transposed(plans):
        return False
    return not any(_refusal(fmt, plan) for plan in plans)


def _refusal(fmt: Format, plan: LayerPlan) -> str | None:
    """Why a format cannot store what becomes of one layer, or of what lies outside of the blocks,
    or None."""
    if plan.spec is None:
        return None
    return fmt.refusal_of(plan.role, plan.spec, plan.layer.shape)


def _transposed(plans: list[LayerPlan]) -> str | None:
    """The first quantized layer that computes with a transposed weight, or None."""
    found = (plan.layer.name for plan in plans if plan.spec and plan.layer.is_transposed)
    return next(found, None)


def _specs(plans: list[LayerPlan]) -> Specs:
    return {plan.layer.name: plan.spec for plan in plans if not plan.role}
