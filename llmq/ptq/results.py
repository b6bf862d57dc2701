"""What becomes of a block: its report, what is stored of it, and what was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.layers import LayerReport
from llmq.ptq.methods.base import BlockTuning, ClassErrors


@dataclass(frozen=True)
class BlockReport:
    """index, layers, seconds for the block; output_error: squared distance of the quantized block's
    outputs from the full-precision model's on the first batch, relative. start_error, tuned_error:
    mean over tokens of such a distance before and after block-wise tuning; n_skipped_steps: its
    steps without a finite loss or gradient; tuning_by_class: its errors by class of positions;
    tuning_worse_in: classes that it made worse, so that its start was kept. experts: how the text
    reached those of each module (`llmq.ptq.experts.Coverage`). transforms: what each of them moved
    (`llmq.ptq.transforms.apply.Moved`)."""

    index: int
    layers: list[LayerReport]
    seconds: float
    output_error: float | None = None
    start_error: float | None = None
    tuned_error: float | None = None
    n_skipped_steps: int = 0
    tuning_by_class: dict[str, ClassErrors] = field(default_factory=dict)
    tuning_worse_in: list[str] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    transforms: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def block_report(
    index: int,
    layers: list[LayerReport],
    output_error: float | None,
    tuning: BlockTuning | None,
) -> BlockReport:
    """The report of a block that is solved; how long it took is known later."""
    if tuning is None:
        return BlockReport(index, layers, 0.0, output_error)
    return BlockReport(
        index,
        layers,
        0.0,
        output_error,
        start_error=tuning.start_error,
        tuned_error=tuning.error,
        n_skipped_steps=tuning.n_skipped,
        tuning_by_class=tuning.by_class,
        tuning_worse_in=tuning.worse,
    )


@dataclass(frozen=True)
class BlockResult:
    """What is handed over: quantized weights and kept tensors by full parameter or module name, and
    the report."""

    report: BlockReport
    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]


@dataclass(frozen=True)
class StoredBlock:
    """What comes back: the same tensors, read from where they were stored."""

    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]


class Sink(Protocol):
    """Where blocks go. store: stores a block and returns all of it as read back from there. seal:
    makes a stored and verified block count."""

    def store(self, result: BlockResult) -> StoredBlock: ...

    def seal(self, report: BlockReport) -> None: ...


class FinishedBlocks(Protocol):
    """What an earlier run stored. read_block: a block from the stored bytes. forget_after: blocks
    behind one count as finished no more."""

    def read_block(self, index: int) -> StoredBlock: ...

    def forget_after(self, index: int) -> None: ...


@dataclass(frozen=True)
class EarlierRun:
    """What is continued. first_block: the first that is not finished. damaged: blocks among the
    finished that are not as they were."""

    finished: FinishedBlocks
    first_block: int
    damaged: Sequence[int]
