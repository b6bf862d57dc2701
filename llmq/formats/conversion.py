"""What becomes of each layer of a quantized folder that goes into another format: the same values,
bit for bit, or rounded anew where that is allowed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmq.errors import LlmqError
from llmq.formats.base import Format
from llmq.formats.changes import Distance, LayerChange
from llmq.formats.layers import StoredLayers
from llmq.formats.registry import choose_format
from llmq.grid.recode import recode, specs_for
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.recipe import LayerPlan

REMEDY = "give --allow-requantize to round such layers anew, or another --format"


@dataclass(frozen=True)
class Conversion:
    """specs: what each quantized layer becomes. plans: every linear layer. has_order: some layer
    keeps an order of columns of its own."""

    format: Format
    specs: dict[str, QuantSpec]
    plans: list[LayerPlan]
    has_order: bool


def plan_conversion(layers: StoredLayers, fmt: Format, *, allow_requantize: bool) -> Conversion:
    """Decide every layer before anything is written. Raises `LlmqError` for a layer that the format
    cannot hold exactly, unless it may be requantized, and for a model that it cannot hold at
    all."""
    if reason := fmt.refusal_of_activations(layers.activations):
        raise LlmqError(f"{layers.source.folder}: format {fmt.name}: {reason}")
    specs, has_order = _specs(layers, fmt, allow_requantize, None)
    if fmt.refusal_of_model(_all_specs(layers, specs)):
        # Smaller groups hold what larger ones do: those that all layers can have.
        smallest = min(
            spec.columns_per_group(layers.linear[name].shape[1]) for name, spec in specs.items()
        )
        specs, has_order = _specs(layers, fmt, allow_requantize, smallest)
    plans = [
        LayerPlan(layer, specs.get(name), role=layers.roles.get(name, ""))
        for name, layer in layers.linear.items()
    ]
    fmt = choose_format(fmt.name, plans, layers.activations, act_order=has_order)
    return Conversion(fmt, specs, plans, has_order)


def _all_specs(layers: StoredLayers, specs: dict[str, QuantSpec]) -> dict[str, QuantSpec | None]:
    return {name: specs.get(name) for name in layers.linear}


def _specs(
    layers: StoredLayers, fmt: Format, allow_requantize: bool, columns: int | None
) -> tuple[dict[str, QuantSpec], bool]:
    """columns: those that share a scale, where the format has one number for all layers."""
    specs, has_order = {}, False
    for name in layers.packed:
        qtensor = layers.layer(name)
        possible = _possible(fmt, qtensor, layers.roles.get(name, ""), columns)
        spec = next((each for each in possible if _is_exact(fmt, qtensor, each)), None)
        if spec is None and allow_requantize:
            spec = next(iter(possible), None)
        if spec is None:
            raise LlmqError(
                f"{layers.source.folder}: format {fmt.name} cannot hold {name} ({qtensor.spec}) "
                f"exactly: {_reason(fmt, qtensor, layers.roles.get(name, ''))}; {REMEDY}"
            )
        has_order |= _stays(fmt, qtensor, spec) and qtensor.g_idx is not None
        specs[name] = spec
    return specs, has_order


def _is_exact(fmt: Format, qtensor: QuantizedTensor, spec: QuantSpec) -> bool:
    return _stays(fmt, qtensor, spec) or recode(qtensor, spec) is not None


def _possible(
    fmt: Format, qtensor: QuantizedTensor, role: str, columns: int | None
) -> list[QuantSpec]:
    """Specs that a format holds at a layer's shape, the smallest of the others first."""
    found = []
    for spec in specs_for(qtensor.spec, qtensor.shape):
        fits = columns is None or spec.columns_per_group(qtensor.shape[1]) == columns
        if fits and fmt.refusal_of(role, spec, qtensor.shape) is None:
            # Where one number is all that is said of groups, those of whole rows need it, too.
            found.append(spec if columns is None else replace(spec, group_size=columns))
    return found


def _stays(fmt: Format, qtensor: QuantizedTensor, spec: QuantSpec) -> bool:
    """Whether a layer is stored as it is."""
    return spec == qtensor.spec and (qtensor.g_idx is None or fmt.has_order)


def _reason(fmt: Format, qtensor: QuantizedTensor, role: str) -> str:
    if reason := fmt.refusal_of(role, qtensor.spec, qtensor.shape):
        return reason
    return "it stores no order of columns (act-order)"


def convert(
    name: str, qtensor: QuantizedTensor, conversion: Conversion, role: str = ""
) -> tuple[QuantizedTensor, LayerChange]:
    """A layer as `plan_conversion` decided, and what that changed. role: see `StoredLayers`."""
    fmt, spec, before = conversion.format, conversion.specs[name], str(qtensor.spec)
    if _stays(fmt, qtensor, spec):
        return qtensor, LayerChange(name, before, str(spec), is_exact=True)
    recoded = recode(qtensor, spec)
    if recoded is not None:
        return recoded, LayerChange(name, before, str(spec), is_exact=True)
    weight = qtensor.dequantize()
    rounded = QuantizedTensor.quantize(weight, spec)
    rounded = replace(rounded, input_range=qtensor.input_range)
    distance = Distance()
    distance.add(weight, rounded.dequantize())
    reason = _reason(fmt, qtensor, role)
    return rounded, LayerChange(
        name, before, str(spec), False, distance.relative, distance.largest, reason
    )
