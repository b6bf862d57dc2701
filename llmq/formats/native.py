"""The `llmq` format: the in-memory tensors as they are, for everything that other formats cannot
hold exactly.

Per layer `packed`, `scale` and, where they exist, `zero`, `g_idx` and `input_range`. The config
names the spec that most layers share and the layers that differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import Format, Specs
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

VERSION = 1


def _write(qtensor: QuantizedTensor) -> dict[str, Tensor]:
    parts = {
        "packed": qtensor.packed,
        "scale": qtensor.scale,
        "zero": qtensor.zero,
        "g_idx": qtensor.g_idx,
        "input_range": qtensor.input_range,
    }
    return {suffix: part for suffix, part in parts.items() if part is not None}


def _read(
    name: str, tensors: dict[str, Tensor], config: dict[str, Any], shape: tuple[int, int]
) -> QuantizedTensor:
    if config.get("version") != VERSION:
        raise LlmqError(
            f"quantization_config: version {config.get('version')!r} of the llmq format, expected "
            f"{VERSION}; install the llmq that wrote it"
        )
    if missing := {"packed", "scale"} - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    try:
        exceptions = config.get("exceptions") or {}
        spec = QuantSpec.from_json(exceptions.get(name, config["spec"]))
    except KeyError as error:
        raise LlmqError(
            f"quantization_config: no usable spec for {name} ({error}); the checkpoint is damaged"
        ) from None
    return QuantizedTensor(
        tensors["packed"],
        tensors["scale"],
        tensors.get("zero"),
        spec,
        shape,
        tensors.get("g_idx"),
        tensors.get("input_range"),
    )


def _config(specs: Specs) -> dict[str, Any]:
    used = Counter(spec for spec in specs.values() if spec is not None)
    default = used.most_common(1)[0][0] if used else QuantSpec()
    return {
        "quant_method": "llmq",
        "format": "llmq",
        "version": VERSION,
        "spec": default.to_json(),
        "exceptions": {
            name: spec.to_json()
            for name, spec in specs.items()
            if spec is not None and spec != default
        },
        "modules_to_not_convert": [name for name, spec in specs.items() if spec is None],
    }


def _refusal(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    return None  # holds everything


_SUFFIXES = frozenset({"packed", "scale", "zero", "g_idx", "input_range"})
NATIVE = Format("llmq", "packed", _refusal, _write, _read, _config, _SUFFIXES)
