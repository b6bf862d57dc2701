"""What `llmq.quantize` gives back: the report, with its layers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmq.errors import LlmqError
from llmq.ptq.results import BlockReport

if TYPE_CHECKING:
    import pandas


class Report(dict[str, Any]):
    """The report of a run into a folder: the object of its report.json, and `out`, the folder."""

    def rows(self) -> list[dict[str, Any]]:
        """A plain dict for each quantized layer: name, spec, shape, bytes, errors."""
        return [dict(layer) for layer in self["layers"]]

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a table."""
        return _table(self.rows())


class BlockReports(list[BlockReport]):
    """The reports of the blocks of a model in memory, in their order."""

    def rows(self) -> list[dict[str, Any]]:
        """A plain dict for each quantized layer: its block, name, spec, shape, bytes, errors."""
        return [{"block": block.index, **asdict(layer)} for block in self for layer in block.layers]

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a table."""
        return _table(self.rows())


def _table(rows: Sequence[dict[str, Any]]) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError:
        raise LlmqError(
            "to_pandas needs pandas, which is not installed; 'pip install pandas', or use rows(), "
            "which needs nothing"
        ) from None
    return pandas.DataFrame(rows)
