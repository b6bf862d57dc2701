"""The `llmq` format: the in-memory tensors as they are, for everything that other formats cannot
hold exactly.

Per layer `packed`, `scale` and, where they exist, `zero`, `g_idx` and `input_range`. The config
names the spec that most layers share and the layers that differ."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import OWN_METHOD, Format, Settings, Specs, TableRules, Tables
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

VERSION = 1


def most_common_spec(specs: Specs) -> QuantSpec:
    """The spec that most layers share: what a config says once for all."""
    used = Counter(spec for spec in specs.values() if spec is not None)
    return used.most_common(1)[0][0] if used else QuantSpec()


class NativeTables(TableRules):
    """Any spec; the config names them among the exceptions."""

    def refusal(self, role: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        return None

    def stated(self, config: Settings, tables: Tables) -> Settings:
        specs = {name: spec.to_json() for name, (_, spec) in tables.items()}
        return {**config, "exceptions": config["exceptions"] | specs}


class Native(Format):
    """Holds everything."""

    name = "llmq"
    marker = "packed"
    suffixes = frozenset({"packed", "scale", "zero", "g_idx", "input_range"})
    quant_method = OWN_METHOD
    activations = None
    is_own = True
    tables = NativeTables()

    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        return None

    def is_first_choice(self, specs: Specs) -> bool:
        return True

    def zero_bytes(self, spec: QuantSpec, shape: tuple[int, int]) -> int:
        """A byte each."""
        return spec.n_scales(*shape)

    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        parts = {
            "packed": qtensor.packed,
            "scale": qtensor.scale,
            "zero": qtensor.zero,
            "g_idx": qtensor.g_idx,
            "input_range": qtensor.input_range,
        }
        return {suffix: part for suffix, part in parts.items() if part is not None}

    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        if config.get("version") != VERSION:
            raise LlmqError(
                f"quantization_config: version {config.get('version')!r} of the llmq format, "
                f"expected {VERSION}; install the llmq that wrote it"
            )
        if missing := {"packed", "scale"} - tensors.keys():
            raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
        return QuantizedTensor(
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero"),
            self.stated_spec(name, config),
            shape,
            tensors.get("g_idx"),
            tensors.get("input_range"),
        )

    def stated_spec(self, name: str, config: Settings) -> QuantSpec:
        exceptions: Settings = config.get("exceptions") or {}
        try:
            return QuantSpec.from_json(exceptions[name] if name in exceptions else config["spec"])
        except KeyError as error:
            raise LlmqError(
                f"quantization_config: no usable spec for {name} ({error}); the checkpoint is "
                "damaged"
            ) from None

    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        default = most_common_spec(specs)
        exceptions = {
            name: spec.to_json()
            for name, spec in specs.items()
            if spec is not None and spec != default
        }
        return {
            "quant_method": self.quant_method,
            "format": self.name,
            "version": VERSION,
            "spec": default.to_json(),
            "exceptions": exceptions,
            "modules_to_not_convert": [name for name, spec in specs.items() if spec is None],
        }


NATIVE = Native()
