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

from llmq.cards.base import RECORD, base_of
from llmq.cards.head import CARD
from llmq.cards.page import write_card
from llmq.cards.versions import versions
from llmq.evaluation.perplexity import Perplexity, evaluate, perplexity_ratio
from llmq.evaluation.position_classes import (
    HeldOutLosses,
    classify,
    is_special,
    special_ids,
    watching_lengths,
)
from llmq.formats.load import load
from llmq.formats.save import save
from llmq.formats.settings import folder_readings, format_of, quantization_settings
from llmq.models.identity import source_name
from llmq.models.source import Source
from llmq.models.tokens import FINGERPRINT, fingerprint
from llmq.qat.job import QATJob
from llmq.qat.weights import freeze
from llmq.reports import page
from llmq.schema import SCHEMA_KEY, SCHEMA_VERSION
from llmq.storage import files, seals
from llmq.storage.manifest import read_manifest
from llmq.storage.workspace import PUBLISHING
from llmq.text.windows import Windows


def ship(
    model: PreTrainedModel,
    job: QATJob,
    start: Source,
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
    save(_in_source_dtype(model, job.source), staging, source=job.source)
    scores: dict[str, Perplexity] = {}
    by_class: HeldOutLosses | None = None
    if (
        job.held_out is not None
    ):  # of what is on the disk: embeddings and norms are rounded to the source's dtype there
        scored = {"full_precision": job.source, "start": start, "trained": Source(staging)}
        scores, by_class = _score(job, job.held_out, scored)
    worse = [] if by_class is None else by_class.worse("start", "trained")
    improved = not scores or (scores["trained"].value < scores["start"].value and not worse)
    if not improved:
        shutil.rmtree(staging)
        shutil.copytree(start.folder, staging)
    log = work_dir / "log.jsonl"
    report = _report(job, scores, improved, log, seconds)
    started = _start_report(start)
    report["notes"] = started["notes"] | report["notes"]
    report["fallbacks"] = started["fallbacks"]
    report["held_out_by_class"] = {} if by_class is None else by_class.by_class()
    report["trained_worse_in"] = worse
    report |= _readers(staging)
    base = base_of(job.model_dir)
    report |= {RECORD: base.to_json(), **_sizes(staging, job)}
    if log.exists():
        shutil.copyfile(log, staging / "log.jsonl")
    # What was read back when it was written has to be what is published.
    checked = read_manifest(staging)
    for name in ("report.json", CARD, page.PAGE):
        checked.pop(name, None)
    files.write_json(staging / "report.json", report)
    write_card(staging, report, base, files.real_path(out_dir).name)
    page.write_beside(staging)
    if (work_dir / "trainer" / "runs").is_dir():
        shutil.copytree(work_dir / "trainer" / "runs", staging / "runs")  # TensorBoard's
    (staging / files.MANIFEST).unlink()
    files.write_manifest(staging, checked)
    job.check_sources()
    seals.write_sealed(work_dir / PUBLISHING, files.digest(staging / files.MANIFEST))
    files.publish(staging, out_dir)
    return report


def _start_report(start: Source) -> dict[str, Any]:
    """The report of the PTQ start."""
    report: dict[str, Any] = json.loads((start.folder / "report.json").read_text())
    return report


def _sizes(folder: Path, job: QATJob) -> dict[str, Any]:
    """Weight files before and after, and bits per weight of the model."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "source_bytes": job.source.weight_bytes,
        "stored_bytes": stored,
        "bits_per_weight": round(8 * stored / job.n_parameters, 4),
    }


def _readers(folder: Path) -> dict[str, Any]:
    """Format of a folder, and which engines read it."""
    source = Source(folder)
    settings = quantization_settings(source.config)
    engines = folder_readings(source) or []
    return {
        "format": None if settings is None else format_of(settings).name,
        "engines": [reading.to_json() for reading in engines],
    }


def is_published(work_dir: Path, out_dir: Path) -> bool:
    """Whether an output is what the run in a work folder was about to put there."""
    try:
        return bool(
            seals.read_sealed(work_dir / PUBLISHING) == files.digest(out_dir / files.MANIFEST)
        )
    except (files.DamagedError, OSError):
        return False


def _score(
    job: QATJob, held_out: Windows, scored: dict[str, Source]
) -> tuple[dict[str, Perplexity], HeldOutLosses]:
    """Perplexities of some models, and their losses by class of positions. What is
    an outlier is seen in the full-precision model."""
    scores: dict[str, Perplexity] = {}
    losses: dict[str, Tensor] = {}
    ratios: list[Tensor] = []
    for name, source in scored.items():
        model, parts = load(source, dtype="float32"), list[Tensor]()
        is_full = name == "full_precision"
        with watching_lengths(model, ratios) if is_full else nullcontext():
            scores[name] = evaluate(model, held_out, on_losses=parts.append)
        losses[name] = torch.cat(parts)
    ids = special_ids(job.source.config, job.source.tokenizer)
    classes = classify(is_special(held_out.tokens, ids), torch.cat(ratios), 1.0)
    return scores, HeldOutLosses(losses, classes[:, :-1])


def _in_source_dtype(model: PreTrainedModel, source: Source) -> PreTrainedModel:
    """Embeddings, norms and biases go back to the dtype that the source stores; packed weights and
    scales stay as they are."""
    dtype = source.config.dtype or torch.float32
    model.config.dtype = dtype
    return model.to(dtype)


def _nothing_compared(job: QATJob) -> str:
    asked = job.settings.n_held_out > 0
    reason = "fewer than 10 windows" if asked else "none was asked for"
    return f"no held-out text ({reason}): nothing was compared"


def _scored(score: Perplexity, scores: dict[str, Perplexity]) -> dict[str, Any]:
    """A perplexity, and how far above that of full precision it is."""
    full = scores["full_precision"]
    return score.to_json() | ({} if score is full else perplexity_ratio(full, score))


def _report(
    job: QATJob, scores: dict[str, Perplexity], improved: bool, log: Path, seconds: float
) -> dict[str, Any]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        SCHEMA_KEY: SCHEMA_VERSION,
        "model": job.source.name,
        "teacher": job.teacher.name,
        "teacher_dtype": job.teacher_dtype,
        "method": "qat",
        "shipped": "trained" if improved else "start",
        "verdict": None if scores else _nothing_compared(job),
        "settings": job.settings.to_json(),
        "activations": asdict(job.recipe.activations),
        "transforms": job.moved,
        "train": {
            "source": job.read.get("source") or source_name(job.train),
            "windows": list(job.windows.shape) if job.windows is not None else job.n_windows,
            **({"text": job.read} if job.read else {}),
        },
        "budget": job.budget(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": {name: _scored(score, scores) for name, score in scores.items()},
        "layers": [
            {"name": plan.layer.name, "spec": None if plan.spec is None else str(plan.spec)}
            for plan in job.plans
        ],
        "notes": job.notes,
        FINGERPRINT: fingerprint(job.source.tokenizer),
        **job.source.companions.to_json(),
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
