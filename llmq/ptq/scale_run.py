"""Training the scales of a run's finished blocks (`scale_tuning`), in its folder.

What was found is written before any block is stored again, so that a run that is killed in between
goes on with the same scales."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
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

    def run(self, on_step: OnStep = lambda done, total: None) -> dict[str, Any]:
        """Train the scales and store every block with its own again. Returns what the report says
        of it."""
        reports = self.partial.block_reports()
        done: list[dict[str, Any]] = [report.get(DONE, {}) for report in reports]
        if all(done):  # by a run that ended behind this step
            return done[0]
        about: dict[str, Any]
        try:
            about = seals.read_sealed(self._about_path)
            scales = self._kept_scales()
        except files.DamagedError:
            about, scales = self._trained(on_step)
        for index in range(len(reports)):
            if scales and not done[index]:
                self._store(index, scales, about)
        return about

    @property
    def _scales_path(self) -> Path:
        return self.partial.work_dir / "scales.safetensors"

    @property
    def _about_path(self) -> Path:
        return self.partial.work_dir / "scales.json"

    def _kept_scales(self) -> dict[str, Tensor]:
        if not seals.is_sound(self._scales_path):
            raise files.DamagedError(f"{self._scales_path}: is not as it was written")
        return load_file(self._scales_path)

    def _trained(self, on_step: OnStep) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What came out, and the scales by name of layer, none where the start was kept."""
        job = self.job
        assert job.tokens is not None
        options = ScaleOptions(
            steps=job.recipe.scale_steps,
            autocast=job.precision(self.device).training == torch.bfloat16,
            seed=job.recipe.seed,
            special=special_ids(job.config, job.source.tokenizer),
        )
        with tempfile.TemporaryDirectory(prefix="scales-", dir=self.partial.work_dir) as folder:
            pair = Pair.of_run(job, self.sink, self.device)
            found = tune_scales(pair, job.tokens.tokens, options, Path(folder), on_step)
        scales = _scales_of(found.blocks)
        about = found.to_json()
        files.write_tensors(self._scales_path, scales)
        seals.seal(self._scales_path)
        seals.write_sealed(self._about_path, about)
        return about, scales

    def _store(self, index: int, scales: dict[str, Tensor], about: dict[str, Any]) -> None:
        block = self.sink.read_block(index)
        quantized = {
            name: replace(tensor, scale=scales[name]) for name, tensor in block.quantized.items()
        }
        self.sink.replace_block(index, StoredBlock(quantized, block.kept), {DONE: about})


def _scales_of(blocks: Sequence[StoredBlock]) -> dict[str, Tensor]:
    return {name: tensor.scale for block in blocks for name, tensor in block.quantized.items()}
