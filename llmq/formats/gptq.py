"""The GPTQ format, versions 1 and 2, as AutoGPTQ, GPTQModel, vLLM and SGLang read it.

    qweight int32 [K * bits / 32, N]   the canonical words, transposed
    qzeros  int32 [G, N * bits / 32]   zero points packed along N; version 1 stores z - 1
    scales  float16 [G, N]
    g_idx   int32 [K]                  the group of each column; always written

Version 1 cannot hold a zero point of 0 (it would borrow across the word), so asymmetric tensors are
written as version 2. When reading version 1, decoded zero points are shifted, never words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from llmq import patterns
from llmq.errors import LlmqError
from llmq.formats.base import Format, Specs
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.packing import pack, unpack

_BITS = (2, 3, 4, 8)
_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _refusal(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    n, k = shape
    if spec.code == "ternary":
        return "it has no ternary codes"
    if spec.levels.offset % 1:
        return "it has whole zero points only"
    if spec.bits not in _BITS:
        return f"it holds codes of 2, 3, 4 and 8 bits, not {spec.bits}"
    if spec.group_size == PER_TENSOR:
        return "it has no scale per tensor"
    if spec.scale_dtype != "float16":
        return f"its scales are float16, not {spec.scale_dtype}"
    if k % 32 or n % 32:
        return f"it needs N and K divisible by 32, not {n} x {k}"
    return None


def _offset(is_v2: bool) -> int:
    return 0 if is_v2 else 1


def _write(qtensor: QuantizedTensor, *, v2: bool) -> dict[str, Tensor]:
    _n, k = qtensor.shape
    spec = qtensor.spec
    zero = (
        torch.full(
            qtensor.scale.shape,
            int(spec.levels.offset),
            dtype=torch.uint8,
            device=qtensor.scale.device,
        )
        if qtensor.zero is None
        else qtensor.zero
    )
    if not v2 and bool((zero == 0).any()):
        raise LlmqError(
            "GPTQ version 1 stores zero points minus one and cannot hold a zero point of 0; write "
            "--format gptq_v2 or llmq"
        )
    g_idx = (
        qtensor.g_idx
        if qtensor.g_idx is not None
        else torch.arange(k, dtype=torch.int32) // spec.columns_per_group(k)
    )
    return {
        "qweight": qtensor.packed.T.contiguous(),
        "qzeros": pack((zero - _offset(v2)).T.contiguous(), spec.bits),
        "scales": qtensor.scale.T.contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def settings_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """bits, group_size and sym of a layer, the `dynamic` overrides included (regular expressions;
    the first that matches wins)."""
    settings = dict(config)
    for pattern, overrides in (config.get("dynamic") or {}).items():
        expression = pattern.removeprefix("+:").removeprefix("-:")
        if patterns.matches(expression, name, "quantization_config: dynamic"):
            settings.update(overrides)
            break
    return settings


def _read(
    name: str, tensors: dict[str, Tensor], config: dict[str, Any], shape: tuple[int, int]
) -> QuantizedTensor:
    if missing := {"qweight", "qzeros", "scales"} - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    for suffix in ("qweight", "qzeros", "g_idx"):
        if suffix in tensors and tensors[suffix].dtype != torch.int32:
            raise LlmqError(
                f"{name}.{suffix}: expected torch.int32, got {tensors[suffix].dtype}; the "
                "checkpoint is damaged"
            )
    n, k = shape
    settings = settings_of(name, config)
    bits, qweight, scales = int(settings.get("bits", 4)), tensors["qweight"], tensors["scales"]
    n_groups = scales.shape[0]
    if (
        bits not in _BITS
        or tuple(qweight.shape) != (k * bits // 32, n)
        or tuple(scales.shape) != (n_groups, n)
        or scales.dtype not in _DTYPE_NAMES
    ):
        raise LlmqError(
            f"{name}: {bits}-bit GPTQ tensors for a weight of {n} x {k} expected, got qweight "
            f"{list(qweight.shape)} and scales {list(scales.shape)} {scales.dtype}"
        )
    if tuple(tensors["qzeros"].shape) != (n_groups, n * bits // 32):
        raise LlmqError(
            f"{name}.qzeros: expected shape {[n_groups, n * bits // 32]}, got "
            f"{list(tensors['qzeros'].shape)}"
        )
    group_size = _group_size(name, int(settings.get("group_size", -1)), k, n_groups)
    is_v2 = config.get("checkpoint_format") == "gptq_v2"
    zero = (unpack(tensors["qzeros"], bits, n) + _offset(is_v2)).T.contiguous()
    spec = QuantSpec(
        f"int{bits}",
        group_size,
        symmetric=bool((zero == 1 << (bits - 1)).all()),
        scale_dtype=_DTYPE_NAMES[scales.dtype],  # type: ignore[arg-type]
    )
    g_idx = tensors.get("g_idx")
    if g_idx is not None and torch.equal(
        g_idx.long(), torch.arange(k, device=g_idx.device) // spec.columns_per_group(k)
    ):
        g_idx = None
    return QuantizedTensor(
        qweight.T.contiguous(),
        scales.T.contiguous(),
        None if spec.symmetric else zero,
        spec,
        shape,
        g_idx,
    )


def _group_size(name: str, asked: int, k: int, n_groups: int) -> int:
    if n_groups == 1:
        return PER_ROW
    if asked < 2 or -(-k // asked) != n_groups:
        raise LlmqError(
            f"{name}: group size {asked} of the config does not give the {n_groups} groups of the "
            f"stored scales for K = {k}"
        )
    return asked


def package_version() -> str:
    try:
        return version("llmq")
    except PackageNotFoundError:
        return "0"


def _config(specs: Specs, *, v2: bool) -> dict[str, Any]:
    used = Counter(spec for spec in specs.values() if spec is not None)
    default = used.most_common(1)[0][0] if used else QuantSpec()
    dynamic: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        pattern = re.escape(name) + "$"
        if spec is None:
            dynamic["-:" + pattern] = {}
        elif spec != default:
            dynamic["+:" + pattern] = {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "sym": spec.symmetric,
            }
    return {
        "quant_method": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"llmq:{package_version()}"]},
    }


def _format(name: str, *, v2: bool) -> Format:
    def refusal(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if not v2 and not spec.symmetric:
            return "version 1 cannot hold every zero point; use gptq_v2"
        return _refusal(spec, shape)

    return Format(
        name,
        "qweight",
        refusal,
        lambda qtensor: _write(qtensor, v2=v2),
        _read,
        lambda specs: _config(specs, v2=v2),
        frozenset({"qweight", "qzeros", "scales", "g_idx"}),
    )


GPTQ_V1 = _format("gptq", v2=False)
GPTQ_V2 = _format("gptq_v2", v2=True)


def with_act_order(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint whose `g_idx` are not trivial."""
    return {**config, "desc_act": True}


_FUSED = {
    name: members
    for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for name in members
}


def fused_disagreement(specs: Iterable[tuple[str, QuantSpec | None]]) -> str | None:
    """Layers that vLLM and SGLang join into one although they are quantized differently (or one of
    them is not), so that these engines cannot load the folder; None where there are none."""
    first: dict[tuple[str, tuple[str, ...]], tuple[str, QuantSpec | None]] = {}
    for name, spec in specs:
        parent, _, leaf = name.rpartition(".")
        if leaf in _FUSED:
            other, expected = first.setdefault((parent, _FUSED[leaf]), (name, spec))
            if spec != expected:
                return f"{other} ({expected or 'kept'}) and {name} ({spec or 'kept'}) are one layer there, whose parts must be quantized alike"
    return None


def engines_load(spec: QuantSpec) -> bool:
    """Whether vLLM and SGLang take a tensor of this spec in GPTQ format: symmetric, 4 or 8 bits, a
    usual group size."""
    return (
        spec.symmetric
        and spec.code in ("int4", "int8")
        and spec == replace(spec, scale_dtype="float16")
        and spec.group_size in (PER_ROW, 32, 64, 128)
    )
