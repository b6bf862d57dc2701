"""What an export did: what became of each layer, and of the model as a whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from llmq.formats.engines import Reading


@dataclass(frozen=True)
class LayerChange:
    """before: a spec in its short form. after: the same, or the blocks of a file. is_exact: the
    float32 values are the same. error: `|W - W'| / |W|` (Frobenius), max_error: the largest `|w -
    w'|`; both 0 where it is exact. reason: why it is not, "" where it is."""

    name: str
    before: str
    after: str
    is_exact: bool
    error: float = 0.0
    max_error: float = 0.0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Distance:
    """Between a weight and what is stored of it, some rows at a time: sums of squares, and the
    largest difference."""

    of_difference: float = 0.0
    of_weight: float = 0.0
    largest: float = 0.0

    def add(self, weight: Tensor, stored: Tensor) -> None:
        """Rows of both, float32."""
        difference = stored - weight
        self.of_difference += float(difference.norm()) ** 2
        self.of_weight += float(weight.norm()) ** 2
        self.largest = max(self.largest, float(difference.abs().max()))

    @property
    def relative(self) -> float:
        """As a share of the weight's norm."""
        norm = self.of_weight**0.5
        return self.of_difference**0.5 / norm if norm else self.of_difference**0.5


@dataclass(frozen=True)
class ExportReport:
    """source_format: "" for a model in full precision. layers: those that are packed in the source.
    types: how many stored tensors there are of each type, as the container calls it. engines: which
    of them reads the result. left_out: stored tensors of packed layers that decide nothing. notes:
    what else is to be known. card: where the model card lies."""

    source: str
    out: str
    source_format: str
    format: str
    source_bytes: int
    stored_bytes: int
    layers: tuple[LayerChange, ...]
    types: dict[str, int]
    engines: tuple[Reading, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    card: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether every layer has the float32 values that it had."""
        return all(layer.is_exact for layer in self.layers)

    @property
    def requantized(self) -> list[LayerChange]:
        """The layers that were rounded anew."""
        return [layer for layer in self.layers if not layer.is_exact]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": self.out,
            "card": self.card,
            "source_format": self.source_format,
            "format": self.format,
            "exact": self.is_exact,
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "n_layers": len(self.layers),
            "n_requantized": len(self.requantized),
            "max_relative_error": max((layer.error for layer in self.layers), default=0.0),
            "max_error": max((layer.max_error for layer in self.layers), default=0.0),
            "requantized": {layer.name: layer.reason for layer in self.requantized},
            "changed_layers": [
                layer.to_json()
                for layer in self.layers
                if not layer.is_exact or layer.before != layer.after
            ],
            "types": self.types,
            "engines": [reading.to_json() for reading in self.engines],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
