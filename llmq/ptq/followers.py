"""What the processes behind the first one have in the place of its output folder: they see the
blocks that lie there, and write none."""

from __future__ import annotations

from pathlib import Path

from llmq.errors import LlmqError
from llmq.ptq.job import Job
from llmq.ptq.leaves import N_LEAVES
from llmq.ptq.ranks import Ranks
from llmq.ptq.results import BlockReport, BlockResult, EarlierRun, FinishedBlocks, StoredBlock
from llmq.storage import files

SHARED_METHODS = ("gptq", "blockwise")


class Follower:
    """Takes blocks as what was solved; the first process has them read back and verified."""

    def store(self, result: BlockResult) -> StoredBlock:
        return StoredBlock(result.quantized, result.kept)

    def seal(self, report: BlockReport) -> None:
        """The first process does."""


class SharedBlocks:
    """The finished blocks for all processes. finished: in the first one."""

    def __init__(self, ranks: Ranks, finished: FinishedBlocks | None) -> None:
        self.ranks, self.finished = ranks, finished

    def read_block(self, index: int) -> StoredBlock:
        own = self._own().read_block(index) if self.ranks.is_first else None
        found = self.ranks.broadcast(own)
        assert found is not None
        return found

    def forget_after(self, index: int) -> None:
        if self.ranks.is_first:
            self._own().forget_after(index)

    def _own(self) -> FinishedBlocks:
        assert self.finished is not None
        return self.finished


def earlier_run(ranks: Ranks, own: EarlierRun | None) -> EarlierRun:
    """What is continued, as the first process found it."""
    known = None if own is None else (own.first_block, list(own.damaged))
    first_block, damaged = ranks.broadcast(known) or (0, [])
    return EarlierRun(
        SharedBlocks(ranks, None if own is None else own.finished), first_block, damaged
    )


def check_shared(job: Job, ranks: Ranks) -> None:
    """Raise `LlmqError` for what one process alone can do yet."""
    if not ranks.are_many:
        return
    recipe = job.recipe
    reasons = {
        f"method {recipe.method}": recipe.method not in SHARED_METHODS,
        "calibration with pictures": job.tokens is not None and job.tokens.pictures is not None,
    }
    for what, is_asked in reasons.items():
        if is_asked:
            raise LlmqError(
                f"{what}: not on {ranks.size} processes, which share the work of methods "
                f"{' and '.join(SHARED_METHODS)} on text; start one process, without torchrun"
            )
    n_sequences = 0 if job.tokens is None else len(job.tokens.tokens)
    if n_sequences < N_LEAVES:
        raise LlmqError(
            f"{n_sequences} calibration sequences for {ranks.size} processes: expected at least "
            f"{N_LEAVES}; give more --samples"
        )


def own_folder(ranks: Ranks, work_dir: Path) -> Path:
    """Where a process keeps the hidden states of its share, beside those of the others; those of
    another number of processes are removed, which nobody could go on from. One alone keeps them in
    the work folder itself."""
    if not ranks.are_many:
        return work_dir
    own = work_dir / f"rank-{ranks.rank}-of-{ranks.size}"
    own.mkdir(parents=True, exist_ok=True)
    for other in work_dir.glob(f"rank-{ranks.rank}-of-*"):
        if other != own:
            files.remove(other)
    return own
