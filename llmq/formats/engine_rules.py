"""Why an engine does not read a result in a format that it opens: a rule per engine and format.

Each was found by running the engine or in its source, as llmq/formats/README.md says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmq.formats.base import Specs
from llmq.grid.spec import PER_ROW, PER_TENSOR, ActSpec, QuantSpec
from llmq.models.experts import DOWN, GATE, UP
from llmq.models.site import fused_names

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_MARLIN_GROUPS = {PER_ROW, 32, 64, 128}


@dataclass(frozen=True)
class Result:
    """What is asked about. format: its name. specs: every linear layer by the name that it is
    stored under, None: kept. act_order: columns are not in the order of their groups."""

    format: str
    specs: Specs
    activations: ActSpec = field(default_factory=ActSpec)
    act_order: bool = False

    @property
    def quantized(self) -> dict[str, QuantSpec]:
        return {name: spec for name, spec in self.specs.items() if spec is not None}

    @property
    def experts(self) -> dict[str, dict[str, QuantSpec | None]]:
        """Layers of experts, by the name of the module that all experts lie in and their own below
        it, where any of them is quantized."""
        found: dict[str, dict[str, QuantSpec | None]] = {}
        for name, spec in self.specs.items():
            if place := _EXPERT.match(name):
                found.setdefault(place[1], {})[name] = spec
        return {name: specs for name, specs in found.items() if any(specs.values())}

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


def expert_disagreement(result: Result) -> str | None:
    """Layers of experts that are quantized differently inside of one module, which vLLM and SGLang
    have as one layer."""
    for specs in result.experts.values():
        first, expected = next(iter(specs.items()))
        for name, spec in specs.items():
            if spec != expected:
                return (
                    f"{first} ({expected or 'kept'}) and {name} ({spec or 'kept'}) are one layer "
                    "of experts there, which must be quantized alike"
                )
    return None


def _joined_disagreement(result: Result) -> str | None:
    return expert_disagreement(result) or fused_disagreement(result.specs)


def anything(result: Result) -> str | None:
    return None


def gptqmodel(result: Result) -> str | None:
    """It has a layer for each expert, under the names that transformers gives them."""
    own = {GATE, UP, DOWN}
    names = [name for specs in result.experts.values() for name in specs]
    other = next((name for name in names if name.rpartition(".")[2] not in own), None)
    return other and f"{other}: it looks for experts under the names {GATE}, {UP}, {DOWN} only"


def gptqmodel_awq(result: Result) -> str | None:
    return awq_in_groups(result) or gptqmodel(result)


def _fused_experts(result: Result) -> str | None:
    """transformers has one parameter for all experts, and merges their tensors while it loads: of
    compressed-tensors, but not those that are GPTQ's or AWQ's."""
    if result.experts:
        return "it has one parameter for all experts there, which it fills with random numbers"
    return None


def transformers_awq(result: Result) -> str | None:
    return awq_in_groups(result) or _fused_experts(result)


def mlx_awq(result: Result) -> str | None:
    if result.experts:
        return "it joins experts before it unpacks AWQ, and does not find them"
    return awq_in_groups(result)


def vllm_gptq(result: Result) -> str | None:
    return (
        _other_codes(result, {"int4", "int8"})
        or _asymmetric(result)
        or _other_groups(result, _MARLIN_GROUPS)
        or _ordered(result)
        or _joined_disagreement(result)
    )


def vllm_cpu_gptq(result: Result) -> str | None:
    return _experts_on_cpu(result) or _other_codes(result, {"int4"}) or vllm_gptq(result)


def vllm_cpu_awq(result: Result) -> str | None:
    return _experts_on_cpu(result) or vllm_awq(result)


def _experts_on_cpu(result: Result) -> str | None:
    return "it multiplies experts of few bits on CPUs with AMX only" if result.experts else None


def vllm_awq(result: Result) -> str | None:
    return (
        _other_groups(result, _MARLIN_GROUPS) or expert_disagreement(result) or _fused_codes(result)
    )


def vllm_compressed(result: Result) -> str | None:
    """2 and 3 bits, and zero points at 8, are for its Humming kernels."""
    if result.activations.kind == "none":
        return (
            _whole(result) or _other_groups(result, _MARLIN_GROUPS) or _joined_disagreement(result)
        )
    return _vllm_experts(result) or _vllm_integers(result) or _joined_disagreement(result)


def _vllm_experts(result: Result) -> str | None:
    """Of experts that meet activations of 8 bits: fewer rules than other layers have."""
    specs = [spec for module in result.experts.values() for spec in module.values() if spec]
    if not specs:
        return None
    if result.activations.kind != "int8-token":
        return "it takes experts with activations that are rounded by token only"
    if any(spec.code != "int8" for spec in specs):
        return "it takes experts of 8 bits with activations of 8 bits"
    return None


def vllm_cpu_compressed(result: Result) -> str | None:
    if reason := _experts_on_cpu(result):
        return reason
    if result.activations.kind == "none":
        return _other_codes(result, {"int4"}) or _whole(result) or _joined_disagreement(result)
    return _vllm_integers(result) or _joined_disagreement(result)


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
    return _ordered(result) or _joined_disagreement(result)


def sglang_compressed(result: Result) -> str | None:
    codes = {"int4", "int8"} if result.activations.kind == "none" else {"int8"}
    return (
        _other_codes(result, codes)
        or _whole(result)
        or _asymmetric(result)
        or _joined_disagreement(result)
    )


def transformers_compressed(result: Result) -> str | None:
    """Experts are unpacked while they are merged."""
    if result.experts and result.activations.kind != "none":
        return "it has one parameter for all experts, and rounds no activations for it"
    layer = result.layer_that(lambda spec: not spec.symmetric)
    return layer and f"{layer}: it takes zero points with dequantize=True only"


def optimum_gptq(result: Result) -> str | None:
    """optimum leaves `dynamic` aside: one width and one group size for every layer."""
    if reason := _fused_experts(result):
        return reason
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
