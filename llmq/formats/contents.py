"""What is written of a quantized model that is in memory, and what its card says of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.cards.base import UNNAMED, Base, base_of, is_packed
from llmq.cards.page import write_card
from llmq.cards.versions import versions
from llmq.formats.engines import Reading
from llmq.grid.spec import ActSpec
from llmq.recipe import LayerPlan


@dataclass(frozen=True)
class Contents:
    """tensors: by their names in the model. n_extra: weights that are stored beside it. config: the
    `quantization_config`. format: its name. plans: of every linear layer, and of what is quantized
    outside of the blocks. engines: which of them reads the result."""

    tensors: dict[str, Tensor]
    n_extra: int
    config: dict[str, Any]
    format: str
    plans: list[LayerPlan]
    activations: ActSpec
    engines: list[Reading]

    @property
    def n_weights(self) -> int:
        """All that are stored, packed or not."""
        packed = {plan.layer.name: plan for plan in self.plans if plan.spec is not None}
        dense = sum(
            tensor.numel()
            for name, tensor in self.tensors.items()
            if name.rpartition(".")[0] not in packed or name.endswith(".bias")
        )
        return self.n_extra + dense + sum(prod(plan.layer.shape) for plan in packed.values())

    def report(self, stored_bytes: int) -> dict[str, Any]:
        """Those keys of a report that are known without a run."""
        inside = [plan for plan in self.plans if not plan.role]
        return {
            "format": self.format,
            "layers": [
                {"name": plan.layer.name, "spec": None if plan.spec is None else str(plan.spec)}
                for plan in inside
            ],
            "outside": [
                {"role": plan.role, "spec": str(plan.spec)} for plan in self.plans if plan.role
            ],
            "activations": self.activations.to_json(),
            "stored_bytes": stored_bytes,
            "bits_per_weight": 8 * stored_bytes / self.n_weights,
            "engines": [reading.to_json() for reading in self.engines],
            "versions": versions(),
        }


def write_card_of(contents: Contents, folder: Path, source_dir: Path | None, name: str) -> None:
    """Put the card of a model that was in memory into its folder, behind the weights. source_dir:
    what it was loaded from. name: of the folder, where it will be."""
    report = contents.report(_weight_bytes(folder))
    if source_dir is None:
        write_card(folder, report, Base(UNNAMED), name)
        return
    if not is_packed(source_dir) and (before := _weight_bytes(source_dir)):
        report["source_bytes"] = before
    write_card(folder, report, base_of(source_dir), name)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
