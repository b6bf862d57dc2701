"""Why an engine does not read a result in a format that it opens: a rule per engine and format.

Each was found by running the engine or in its source, as llmq/formats/README.md says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmq.formats.base import Specs
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec
from llmq.models.site import fused_names


@dataclass(frozen=True)
class Result:
    """What is asked about. format: its name. specs: every linear layer by name, None: kept.
    act_order: columns are not in the order of their groups."""

    format: str
    specs: Specs
    activations: ActSpec = field(default_factory=ActSpec)
    act_order: bool = False

    @property
    def quantized(self) -> dict[str, QuantSpec]:
        return {name: spec for name, spec in self.specs.items() if spec is not None}

    def layer_that(self, differs: Callable[[QuantSpec], bool]) -> str | None:
        """The first layer whose spec does something, with that spec."""
        for name, spec in self.quantized.items():
            if differs(spec):
                return f"{name} ({spec})"
        return None


def fused_disagreement(specs: Specs) -> str | None:
    """Layers that vLLM and SGLang join into one although they are quantized differently (or one of
    them is not); None where there are none."""
    first: dict[tuple[str, ...], tuple[str, QuantSpec | None]] = {}
    for name, spec in specs.items():
        other, expected = first.setdefault(fused_names(name), (name, spec))
        if spec != expected:
            return (
                f"{other} ({expected or 'kept'}) and {name} ({spec or 'kept'}) are one layer "
                "there, whose parts must be quantized alike"
            )
    return None


def anything(result: Result) -> str | None:
    return None


def vllm_gptq(result: Result) -> str | None:
    return (
        _other_codes(result, {"int4", "int8"})
        or _asymmetric(result)
        or _other_groups(result, {PER_ROW, 32, 64, 128})
        or _ordered(result)
        or fused_disagreement(result.specs)
    )


def vllm_awq(result: Result) -> str | None:
    return _other_groups(result, {PER_ROW, 32, 64, 128}) or _fused_codes(result)


def vllm_compressed(result: Result) -> str | None:
    activations = result.activations
    if activations.kv_bits:
        return f"it has no keys and values of {activations.kv_bits}-bit integers"
    if activations.kind == "none":
        return (
            _other_codes(result, {"int2", "int3", "int4", "int8"})
            or _other_groups(result, {PER_ROW, 32, 64, 128})
            or fused_disagreement(result.specs)
        )
    return (
        _other_codes(result, {"int4", "int8"})
        or _asymmetric(result)
        or fused_disagreement(result.specs)
    )


def sglang_gptq(result: Result) -> str | None:
    return _ordered(result) or fused_disagreement(result.specs)


def sglang_compressed(result: Result) -> str | None:
    activations = result.activations
    if activations.kv_bits:
        return f"it has no keys and values of {activations.kv_bits}-bit integers"
    codes = {"int4", "int8"} if activations.kind == "none" else {"int8"}
    return _other_codes(result, codes) or fused_disagreement(result.specs)


def transformers_compressed(result: Result) -> str | None:
    if result.activations.kv_bits:
        return "its cache does not quantize keys and values as the folder says"
    if layer := result.layer_that(lambda spec: not spec.symmetric):
        return f"{layer}: zero points only with dequantize=True"
    return None


def gptqmodel_gptq(result: Result) -> str | None:
    return None


def optimum_gptq(result: Result) -> str | None:
    """optimum leaves `dynamic` aside: one width and one group size for every layer."""
    specs = {replace(spec, symmetric=True) for spec in result.quantized.values()}
    if len(specs) > 1:
        return f"it takes one width and group size for all layers, not {_several(specs)}"
    return None


def gptqmodel_awq(result: Result) -> str | None:
    return None


def mlx_awq(result: Result) -> str | None:
    return _other_groups(result, {32, 64, 128})


def mlx_bitnet(result: Result) -> str | None:
    return None


def _other_codes(result: Result, known: set[str]) -> str | None:
    layer = result.layer_that(lambda spec: spec.code not in known)
    widths = " and ".join(str(bits) for bits in sorted(int(code[3:]) for code in known))
    return layer and f"{layer}: it takes {widths} bits there"


def _asymmetric(result: Result) -> str | None:
    layer = result.layer_that(lambda spec: not spec.symmetric)
    return layer and f"{layer}: it takes symmetric weights there"


def _other_groups(result: Result, known: set[int]) -> str | None:
    layer = result.layer_that(lambda spec: spec.group_size not in known)
    sizes = [str(size) for size in sorted(known) if size > 0]
    sizes += ["per row"] * (PER_ROW in known) + ["per tensor"] * (PER_TENSOR in known)
    return layer and f"{layer}: it takes group sizes {', '.join(sizes)}"


def _ordered(result: Result) -> str | None:
    return "it refuses act-order (desc_act)" if result.act_order else None


def _fused_codes(result: Result) -> str | None:
    """Symmetric or not is nothing that a layer of AWQ says: its zero points do."""
    alike = {name: spec and replace(spec, symmetric=False) for name, spec in result.specs.items()}
    return fused_disagreement(alike)


def _several(specs: set[QuantSpec]) -> str:
    return " and ".join(sorted(map(str, specs)))
