"""The end of a run: freeze, compare with the start on held-out text, publish the better one with
its report."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.evaluation.perplexity import Perplexity, evaluate
from llmq.evaluation.position_classes import (
    HeldOutLosses,
    classify,
    is_special,
    special_ids,
    watching_lengths,
)
from llmq.formats.load import load
from llmq.formats.save import save
from llmq.models.companions import find_companions
from llmq.models.identity import model_name, source_name
from llmq.models.shards import ShardReader
from llmq.models.source import load_config, load_tokenizer
from llmq.models.tokens import FINGERPRINT, fingerprint
from llmq.ptq.report import versions
from llmq.qat.job import QATJob
from llmq.qat.weights import freeze
from llmq.storage import files, seals
from llmq.storage.manifest import read_manifest
from llmq.storage.workspace import PUBLISHING
from llmq.text.windows import Windows


def ship(
    model: PreTrainedModel,
    job: QATJob,
    start_dir: Path,
    work_dir: Path,
    out_dir: Path,
    overwrite: bool,
    seconds: float,
) -> dict[str, Any]:
    """Freeze, compare with the start on held-out text, and publish the better one."""
    freeze(model, job.recipe.activations)
    staging = work_dir / "out"
    files.remove(staging)
    model.config._name_or_path = str(job.model_dir)  # where its tokenizer and licence come from
    save(_in_source_dtype(model, job.model_dir), staging)
    scores: dict[str, Perplexity] = {}
    by_class: HeldOutLosses | None = None
    if (
        job.held_out is not None
    ):  # of what is on the disk: embeddings and norms are rounded to the source's dtype there
        folders = {"full_precision": job.model_dir, "start": start_dir, "trained": staging}
        scores, by_class = _score(job, job.held_out, folders)
    worse = [] if by_class is None else by_class.worse("start", "trained")
    improved = not scores or (scores["trained"].value < scores["start"].value and not worse)
    if not improved:
        shutil.rmtree(staging)
        shutil.copytree(start_dir, staging)
    log = work_dir / "log.jsonl"
    report = _report(job, scores, improved, log, seconds)
    report["notes"] = json.loads((start_dir / "report.json").read_text())["notes"] | report["notes"]
    report["held_out_by_class"] = {} if by_class is None else by_class.by_class()
    report["trained_worse_in"] = worse
    if log.exists():
        shutil.copyfile(log, staging / "log.jsonl")
    # What was read back when it was written has to be what is published.
    checked = read_manifest(staging)
    checked.pop("report.json", None)
    files.write_json(staging / "report.json", report)
    if (work_dir / "trainer" / "runs").is_dir():
        shutil.copytree(work_dir / "trainer" / "runs", staging / "runs")  # TensorBoard's
    (staging / files.MANIFEST).unlink()
    files.write_manifest(staging, checked)
    job.check_sources()
    seals.write_sealed(work_dir / PUBLISHING, files.digest(staging / files.MANIFEST))
    files.publish(staging, out_dir)
    return report


def is_published(work_dir: Path, out_dir: Path) -> bool:
    """Whether an output is what the run in a work folder was about to put there."""
    try:
        return bool(
            seals.read_sealed(work_dir / PUBLISHING) == files.digest(out_dir / files.MANIFEST)
        )
    except (files.DamagedError, OSError):
        return False


def _score(
    job: QATJob, held_out: Windows, folders: dict[str, Path]
) -> tuple[dict[str, Perplexity], HeldOutLosses]:
    """Perplexities of the models in some folders, and their losses by class of positions. What is
    an outlier is seen in the full-precision model."""
    scores: dict[str, Perplexity] = {}
    losses: dict[str, Tensor] = {}
    ratios: list[Tensor] = []
    for name, folder in folders.items():
        model, parts = load(folder, dtype="float32"), list[Tensor]()
        is_full = name == "full_precision"
        with watching_lengths(model, ratios) if is_full else nullcontext():
            scores[name] = evaluate(model, held_out, on_losses=parts.append)
        losses[name] = torch.cat(parts)
    ids = special_ids(load_config(job.model_dir), load_tokenizer(job.model_dir))
    classes = classify(is_special(held_out.tokens, ids), torch.cat(ratios), 1.0)
    return scores, HeldOutLosses(losses, classes[:, :-1])


def _in_source_dtype(model: PreTrainedModel, model_dir: Path) -> PreTrainedModel:
    """Embeddings, norms and biases go back to the dtype that the source stores; packed weights and
    scales stay as they are."""
    dtype = load_config(model_dir).dtype or torch.float32
    model.config.dtype = dtype
    return model.to(dtype)


def _weights(model_dir: Path) -> set[str]:
    shards = ShardReader(model_dir)
    return {shards.start, *(path.name for path in set(shards.names.values()))}


def _report(
    job: QATJob, scores: dict[str, Perplexity], improved: bool, log: Path, seconds: float
) -> dict[str, Any]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "model": model_name(job.model_dir),
        "teacher": model_name(job.teacher_dir),
        "teacher_dtype": job.teacher_dtype,
        "method": "qat",
        "shipped": "trained" if improved else "start",
        "verdict": None
        if scores
        else f"no held-out text ({'none was asked for' if job.settings.n_held_out == 0 else 'fewer than 10 windows'}): nothing was compared",
        "settings": job.settings.to_json(),
        "activations": asdict(job.recipe.activations),
        "train": {
            "source": source_name(job.train),
            "windows": list(job.windows.shape) if job.windows is not None else job.n_windows,
        },
        "budget": job.budget(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": {name: score.to_json() for name, score in scores.items()},
        "layers": [
            {"name": plan.layer.name, "spec": None if plan.spec is None else str(plan.spec)}
            for plan in job.plans
        ],
        "notes": job.notes,
        FINGERPRINT: fingerprint(load_tokenizer(job.model_dir)),
        **find_companions(job.model_dir, _weights(job.model_dir)).to_json(),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
