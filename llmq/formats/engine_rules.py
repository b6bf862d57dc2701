"""Why an engine does not read a result in a format that it opens: a rule per engine and format.

Each was found by running the engine or in its source, as llmq/formats/README.md says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmq.formats.base import Specs
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec
from llmq.models.site import fused_names

_MARLIN_GROUPS = {PER_ROW, 32, 64, 128}


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
        or _other_groups(result, _MARLIN_GROUPS)
        or _ordered(result)
        or fused_disagreement(result.specs)
    )


def vllm_cpu_gptq(result: Result) -> str | None:
    return _other_codes(result, {"int4"}) or vllm_gptq(result)


def vllm_awq(result: Result) -> str | None:
    return _other_groups(result, _MARLIN_GROUPS) or _fused_codes(result)


def vllm_compressed(result: Result) -> str | None:
    """2 and 3 bits, and zero points at 8, are for its Humming kernels."""
    if result.activations.kind == "none":
        return (
            _whole(result)
            or _other_groups(result, _MARLIN_GROUPS)
            or fused_disagreement(result.specs)
        )
    return _vllm_integers(result) or fused_disagreement(result.specs)


def vllm_cpu_compressed(result: Result) -> str | None:
    if result.activations.kind == "none":
        return _other_codes(result, {"int4"}) or _whole(result) or fused_disagreement(result.specs)
    return _vllm_integers(result) or fused_disagreement(result.specs)


def _vllm_integers(result: Result) -> str | None:
    """Of weights that meet activations of 8 bits: 8 bits per row or tensor, or 4 bits where
    activations are rounded by token."""
    by_token = result.activations.kind == "int8-token"
    codes = {"int4", "int8"} if by_token else {"int8"}
    if reason := _other_codes(result, codes) or _asymmetric(result):
        return reason
    if layer := result.layer_that(lambda spec: spec.code == "int8" and spec.group_size > 0):
        return f"{layer}: it takes no groups of 8-bit weights with 8-bit activations"
    layer = result.layer_that(lambda spec: spec.code == "int4" and spec.group_size == PER_TENSOR)
    return layer and f"{layer}: it takes no scale per tensor there"


def sglang_gptq(result: Result) -> str | None:
    """4 and 8 symmetric bits through Marlin; its older kernels take the rest in float16."""
    return _ordered(result) or fused_disagreement(result.specs)


def sglang_compressed(result: Result) -> str | None:
    codes = {"int4", "int8"} if result.activations.kind == "none" else {"int8"}
    return (
        _other_codes(result, codes)
        or _whole(result)
        or _asymmetric(result)
        or fused_disagreement(result.specs)
    )


def transformers_compressed(result: Result) -> str | None:
    layer = result.layer_that(lambda spec: not spec.symmetric)
    return layer and f"{layer}: it takes zero points with dequantize=True only"


def optimum_gptq(result: Result) -> str | None:
    """optimum leaves `dynamic` aside: one width and one group size for every layer."""
    specs = {replace(spec, symmetric=True) for spec in result.quantized.values()}
    if len(specs) > 1:
        return f"it takes one width and group size for all layers, not {_several(specs)}"
    return None


def awq_in_groups(result: Result) -> str | None:
    """GPTQModel, and mlx-lm."""
    return _other_groups(result, {32, 64, 128})


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


def _whole(result: Result) -> str | None:
    layer = result.layer_that(lambda spec: spec.group_size == PER_TENSOR)
    return layer and f"{layer}: it takes no scale per tensor there"


def _ordered(result: Result) -> str | None:
    return "it refuses act-order (desc_act)" if result.act_order else None


def _fused_codes(result: Result) -> str | None:
    """Symmetric or not is nothing that a layer of AWQ says: its zero points do."""
    alike = {name: spec and replace(spec, symmetric=False) for name, spec in result.specs.items()}
    return fused_disagreement(alike)


def _several(specs: set[QuantSpec]) -> str:
    return " and ".join(sorted(map(str, specs)))
