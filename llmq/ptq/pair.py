"""The full-precision model beside what was made of it: a block of each is in memory at a time, and
the models' own norms and heads say what either means."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.models.readers import CheckpointReader
from llmq.ptq.blocks import Blocks
from llmq.ptq.job import Job
from llmq.ptq.outside import OutsideReader, as_stored
from llmq.ptq.results import FinishedBlocks
from llmq.ptq.sink import FolderSink


@dataclass(frozen=True)
class Pair:
    """exact: the source. stored: the same with what lies outside of the blocks as it is stored;
    `exact` itself where nothing there was quantized. finished: the blocks as they are stored."""

    exact: Blocks
    stored: Blocks
    finished: FinishedBlocks

    @classmethod
    def of_run(cls, job: Job, sink: FolderSink, device: str) -> Pair:
        """Of a run into a folder. What is read counts as no part of what its blocks were made
        of."""
        reader = CheckpointReader(job.model, job.source.tensors)
        outside = None
        if job.outside:
            number = sink.partial.outside
            outside = OutsideReader(reader, lambda: sink.read_block(number).quantized)
        exact = Blocks(job.model, reader, device)
        return cls(exact, as_stored(exact, outside), sink)
