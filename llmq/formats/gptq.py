"""The GPTQ format, versions 1 and 2, as AutoGPTQ, GPTQModel, vLLM and SGLang read it.

    qweight int32 [K * bits / 32, N]   the canonical words, transposed
    qzeros  int32 [G, N * bits / 32]   zero points packed along N; version 1 stores z - 1
    scales  float16 [G, N]
    g_idx   int32 [K]                  the group of each column; always written

Version 1 cannot hold a zero point of 0 (it would borrow across the word), so asymmetric tensors are
written as version 2. When reading version 1, decoded zero points are shifted, never words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import Format, Settings, Specs
from llmq.formats.engine_names import alike_experts
from llmq.formats.engine_rules import fused_disagreement
from llmq.formats.gptq_settings import (
    AUTO_ROUND,
    AUTO_ROUND_AWQ,
    BITS,
    VERSION_1,
    VERSION_2,
    auto_round_version,
    expression_of,
    read_auto_round,
    read_gptq,
    settings_of,
    stated_version,
)
from llmq.formats.native import most_common_spec
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.site import fused_names, joint_name
from llmq_kernels.core.packing import pack, unpack

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Gptq(Format):
    """name: of the version. shift: what is taken from a zero point when it is stored."""

    marker = "qweight"
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    stores_middle = True
    quant_method = "gptq"
    one_group_size = True

    def __init__(self, name: str, shift: int) -> None:
        self.name, self.shift = name, shift

    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        n, k = shape
        if self.shift and not spec.symmetric:
            return "version 1 cannot hold every zero point; use gptq_v2"
        if spec.code == "ternary":
            return "it has no ternary codes"
        if spec.levels.offset % 1:
            return "it has whole zero points only"
        if spec.bits not in BITS:
            return f"it holds codes of 2, 3, 4 and 8 bits, not {spec.bits}"
        if spec.group_size == PER_TENSOR:
            return "it has no scale per tensor"
        if spec.scale_dtype != "float16":
            return f"its scales are float16, not {spec.scale_dtype}"
        if k % 32 or n % 32:
            return f"it needs N and K divisible by 32, not {n} x {k}"
        return None

    def is_first_choice(self, specs: Specs) -> bool:
        """Version 1, where the other engines load all of the model: version 2 is asked for."""
        quantized = [spec for spec in specs.values() if spec is not None]
        alike = fused_disagreement(specs) is None
        return bool(self.shift) and alike and all(map(engines_load, quantized))

    def layer_bytes(
        self, spec: QuantSpec, shape: tuple[int, int], *, act_order: bool = False
    ) -> int:
        """With the group of every column, whatever their order."""
        return super().layer_bytes(spec, shape) + 4 * shape[1]

    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        _n, k = qtensor.shape
        spec = qtensor.spec
        zero = _zero_points(qtensor)
        if self.shift and bool((zero == 0).any()):
            raise LlmqError(
                "GPTQ version 1 stores zero points minus one and cannot hold a zero point of 0; "
                "write --format gptq_v2 or llmq"
            )
        g_idx = qtensor.g_idx
        if g_idx is None:
            g_idx = torch.arange(k, dtype=torch.int32) // spec.columns_per_group(k)
        return {
            "qweight": qtensor.packed.T.contiguous(),
            "qzeros": pack((zero - self.shift).T.contiguous(), spec.bits),
            "scales": qtensor.scale.T.contiguous(),
            "g_idx": g_idx.to(torch.int32).contiguous(),
        }

    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        n, k = shape
        settings = settings_of(name, config)
        bits = int(settings.get("bits", 4))
        _check_tensors(name, tensors, bits, shape)
        qweight, scales = tensors["qweight"], tensors["scales"]
        group_size = _group_size(name, int(settings.get("group_size", -1)), k, scales.shape[0])
        zero = (unpack(tensors["qzeros"], bits, n) + self.shift).T.contiguous()
        spec = QuantSpec(
            f"int{bits}",
            group_size,
            symmetric=bool((zero == 1 << (bits - 1)).all()),
            scale_dtype=_DTYPE_NAMES[scales.dtype],  # type: ignore[arg-type]
        )
        return QuantizedTensor(
            qweight.T.contiguous(),
            scales.T.contiguous(),
            None if spec.symmetric else zero,
            spec,
            shape,
            _needed_g_idx(tensors.get("g_idx"), spec, k),
        )

    def stated_spec(self, name: str, config: Settings) -> QuantSpec | None:
        stated = settings_of(name, config)
        group_size, symmetric = int(stated.get("group_size", -1)), stated.get("sym", True)
        return QuantSpec(f"int{stated.get('bits', 4)}", group_size, symmetric is not False)

    def states_order(self, config: Settings) -> bool:
        return bool(config.get("desc_act"))

    def detects(self, settings: Settings) -> bool:
        """By the version that is stated; what is neither is version 1's to refuse."""
        method = settings.get("quant_method")
        if method == AUTO_ROUND:
            named = auto_round_version(settings) or VERSION_1
            return self.name == named and settings.get("packing_format") != AUTO_ROUND_AWQ
        return method == self.quant_method and self.name == _version_of(settings)

    def read_config(self, settings: Settings) -> Settings:
        if settings.get("quant_method") == AUTO_ROUND:
            return read_auto_round(settings)
        return read_gptq(settings)

    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        default = most_common_spec(specs)
        return {
            "quant_method": self.quant_method,
            "bits": default.bits,
            "group_size": default.group_size,
            "desc_act": act_order,
            "sym": default.symmetric,
            "lm_head": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "dynamic": _dynamic(specs, default),
            "meta": {"quantizer": [f"llmq:{package_version()}"]},
        }

    def with_kept(
        self, config: Settings, names: Collection[str], quantized: Collection[str] = ()
    ) -> Settings:
        stated = config["dynamic"]
        others = [name for name in names if f"-:{_expression(name)}$" not in stated]
        return {**config, "dynamic": {**stated, **_kept_patterns(others, quantized)}}

    def with_names(self, config: Settings, stored: Mapping[str, str]) -> Settings:
        others = {f"{_expression(name)}$": f"{_expression(stored[name])}$" for name in stored}
        dynamic: dict[str, dict[str, Any]] = {}
        for pattern, overrides in config["dynamic"].items():
            dynamic[pattern] = overrides
            sign, expression = pattern[:2], expression_of(pattern)
            if expression in others:
                dynamic[f"{sign}{others[expression]}"] = overrides
        return {**config, "dynamic": dynamic}

    def companions(self, config: Settings) -> dict[str, Settings]:
        return {"quantize_config.json": config}


GPTQ_V1 = Gptq(VERSION_1, shift=1)
GPTQ_V2 = Gptq(VERSION_2, shift=0)


def _dynamic(specs: Specs, default: QuantSpec) -> dict[str, dict[str, Any]]:
    """What layers are quantized otherwise than most, or kept: by their names, and by that of the
    layer or the module of experts that vLLM and SGLang make of several, which is what they look
    up."""
    named = {**specs, **alike_experts(specs)}
    for name, spec in specs.items():
        joint = joint_name(name)
        members = {specs[each] for each in fused_names(name) if each in specs}
        if joint is not None and joint not in specs and members == {spec}:
            named[joint] = spec
    dynamic: dict[str, dict[str, Any]] = {}
    for name, spec in named.items():
        pattern = _expression(name) + "$"
        if spec is None:
            dynamic["-:" + pattern] = {}
        elif spec != default:
            dynamic["+:" + pattern] = {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "sym": spec.symmetric,
            }
    return dynamic


def _expression(name: str) -> str:
    """A name as a regular expression. What comes before a text model in a wrapper is left open:
    transformers calls it `model.language_model`, vLLM `language_model.model`."""
    before, wrapper, rest = name.rpartition("language_model.")
    return ".*" + re.escape(rest) if wrapper else re.escape(before + rest)


def _kept_patterns(names: Collection[str], quantized: Collection[str]) -> dict[str, dict[str, Any]]:
    """What `dynamic` says of modules that are no layers of the blocks: towers and whole layers by
    where they begin, for all numbers of a layer at once. A head at the top is told by `lm_head`."""
    starts = {start for name in quantized for start in _starts(name)}
    dynamic: dict[str, dict[str, Any]] = {}
    for name in names:
        if "." in name:
            part = next((start for start in _starts(name) if start not in starts), name)
            end = "$" if part == name else r"\."
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", part)
            pattern = _expression(pattern).replace(r"\#", r"\d+") + end
            is_new = f"-:{pattern}" not in dynamic
            if is_new and any(re.match(pattern, other) for other in quantized):
                pattern = _expression(part) + end
            dynamic[f"-:{pattern}"] = {}
    return dynamic


def _starts(name: str) -> list[str]:
    """`a`, `a.b` and `a.b.c` of the latter."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _version_of(settings: Settings) -> str:
    stated = stated_version(settings)
    return stated if stated == VERSION_2 else VERSION_1


def _zero_points(qtensor: QuantizedTensor) -> Tensor:
    """uint8 `[N, G]`, also of a symmetric tensor."""
    if qtensor.zero is not None:
        return qtensor.zero
    middle = int(qtensor.spec.levels.offset)
    return torch.full_like(qtensor.scale, middle, dtype=torch.uint8)


def _check_tensors(
    name: str, tensors: dict[str, Tensor], bits: int, shape: tuple[int, int]
) -> None:
    """Raise `LlmqError` for tensors that are not those of a weight of this shape."""
    n, k = shape
    if missing := {"qweight", "qzeros", "scales"} - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    for suffix in ("qweight", "qzeros", "g_idx"):
        if suffix in tensors and tensors[suffix].dtype != torch.int32:
            raise LlmqError(
                f"{name}.{suffix}: expected torch.int32, got {tensors[suffix].dtype}; the "
                "checkpoint is damaged"
            )
    qweight, scales, qzeros = (tensors[key] for key in ("qweight", "scales", "qzeros"))
    n_groups = scales.shape[0]
    if (
        bits not in BITS
        or tuple(qweight.shape) != (k * bits // 32, n)
        or tuple(scales.shape) != (n_groups, n)
        or scales.dtype not in _DTYPE_NAMES
    ):
        raise LlmqError(
            f"{name}: {bits}-bit GPTQ tensors for a weight of {n} x {k} expected, got qweight "
            f"{list(qweight.shape)} and scales {list(scales.shape)} {scales.dtype}"
        )
    if tuple(qzeros.shape) != (n_groups, n * bits // 32):
        raise LlmqError(
            f"{name}.qzeros: expected shape {[n_groups, n * bits // 32]}, got {list(qzeros.shape)}"
        )


def _needed_g_idx(g_idx: Tensor | None, spec: QuantSpec, k: int) -> Tensor | None:
    """`g_idx`, or None where it says no more than the group size does."""
    if g_idx is None:
        return None
    plain = torch.arange(k, device=g_idx.device) // spec.columns_per_group(k)
    return None if torch.equal(g_idx.long(), plain) else g_idx


def _group_size(name: str, asked: int, k: int, n_groups: int) -> int:
    if n_groups == 1:  # of one group or of one scale per row, whichever the config says
        return asked if asked >= k else PER_ROW
    if asked < 2 or -(-k // asked) != n_groups:
        raise LlmqError(
            f"{name}: group size {asked} of the config does not give the {n_groups} groups of the "
            f"stored scales for K = {k}"
        )
    return asked


def package_version() -> str:
    """The version that is installed, or "0" where llmq is not installed."""
    try:
        return version("llmq")
    except PackageNotFoundError:
        return "0"


def engines_load(spec: QuantSpec) -> bool:
    """Whether vLLM and SGLang take a tensor of this spec in GPTQ format: symmetric, 4 or 8 bits, a
    usual group size."""
    return (
        spec.symmetric
        and spec.code in ("int4", "int8")
        and spec == replace(spec, scale_dtype="float16")
        and spec.group_size in (PER_ROW, 32, 64, 128)
    )
