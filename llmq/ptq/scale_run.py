"""Training the scales of a run's finished blocks (`scale_tuning`), in its folder.

What was found is written beside the blocks before any of them is stored again, and stays there to
the end, so that a run that is killed goes on with the same scales. A block that is lost once others
have theirs cannot be solved again as it was, since what it reads is what those give: then all of
them are done again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llmq.evaluation.position_classes import special_ids
from llmq.ptq.job import Job
from llmq.ptq.pair import Pair
from llmq.ptq.results import StoredBlock
from llmq.ptq.scale_tuning import ScaleOptions, tune_scales
from llmq.ptq.sink import FolderSink
from llmq.storage import files, seals
from llmq.storage.partial_checkpoint import PartialCheckpoint

DONE = "scales_tuned"  # key of a block's report

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class ScaleRun:
    """The finished blocks of a job in a folder."""

    job: Job
    sink: FolderSink
    partial: PartialCheckpoint
    device: str

    def forget_mixture(self) -> None:
        """Before blocks are solved: start over where some have their trained scales and others are
        lost, or the scales are."""
        partial = self.partial
        is_whole = partial.n_finished == partial.n_blocks and not partial.damaged
        if any(map(self._is_done, range(partial.n_blocks))) and not (is_whole and self._is_sound):
            partial.forget_all(
                "a part of it was lost after scales were trained on all of it, and cannot be made "
                "as it was from the other parts"
            )

    def run(self, on_step: OnStep = lambda done, total: None) -> dict[str, Any]:
        """Train the scales and store every block with its own again. Returns what the report says
        of it."""
        if not self._is_sound:
            self._train(on_step)
        about: dict[str, Any] = seals.read_sealed(self._about_path)
        scales = load_file(self._scales_path)
        for index in range(self.partial.n_blocks):
            if about["kept"] and not self._is_done(index):
                self._store(index, scales)
        return about

    def _is_done(self, index: int) -> bool:
        """Whether a block has its trained scales."""
        report = self.partial.report_of(index) if self.partial.is_finished(index) else None
        return bool(report and report.get(DONE))

    @property
    def _is_sound(self) -> bool:
        """Whether there are trained scales, as they were written."""
        try:
            seals.read_sealed(self._about_path)
        except files.DamagedError:
            return False
        return seals.is_sound(self._scales_path)

    @property
    def _scales_path(self) -> Path:
        return self.partial.blocks_dir / "scales.safetensors"

    @property
    def _about_path(self) -> Path:
        return self.partial.blocks_dir / "scales.json"

    def _train(self, on_step: OnStep) -> None:
        job = self.job
        assert job.tokens is not None
        options = ScaleOptions(
            steps=job.recipe.scale_steps,
            dtype=job.precision(self.device).training,
            seed=job.recipe.seed,
            special=special_ids(job.config, job.source.tokenizer),
        )
        with tempfile.TemporaryDirectory(prefix="scales-", dir=self.partial.work_dir) as folder:
            pair = Pair.of_run(job, self.sink, self.device)
            found = tune_scales(pair, job.tokens.tokens, options, Path(folder), on_step)
        files.write_tensors(self._scales_path, _scales_of(found.blocks))
        seals.seal(self._scales_path)
        seals.write_sealed(self._about_path, found.to_json())

    def _store(self, index: int, scales: dict[str, Tensor]) -> None:
        block = self.sink.read_block(index)
        quantized = {
            name: replace(tensor, scale=scales[name]) for name, tensor in block.quantized.items()
        }
        self.sink.replace_block(index, StoredBlock(quantized, block.kept), {DONE: True})


def _scales_of(blocks: Sequence[StoredBlock]) -> dict[str, Tensor]:
    return {name: tensor.scale for block in blocks for name, tensor in block.quantized.items()}
