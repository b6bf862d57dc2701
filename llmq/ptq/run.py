"""Quantize a folder into a folder, or a model in memory: the engine joined to where weights come
from and go to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import llmq
from llmq.cards.base import RECORD, base_of
from llmq.cards.page import write_card
from llmq.errors import LlmqError, VerificationError
from llmq.evaluation.position_classes import special_ids
from llmq.formats.extra import matrices_among
from llmq.formats.save import checkpoint_config, kept_matrices, layer_tensors, write_configs
from llmq.grid.tensor import QuantizedTensor
from llmq.models import compat
from llmq.models.arch import find_blocks
from llmq.models.companions import copy_companions
from llmq.models.identity import hub_id
from llmq.models.readers import CheckpointReader, weight_reader
from llmq.models.tokens import FINGERPRINT, fingerprint
from llmq.ptq.budget import disk_bytes, room_bytes
from llmq.ptq.copied import places_of_others
from llmq.ptq.engine import OnStep, Task, quantize_blocks
from llmq.ptq.followers import Follower, check_shared, earlier_run, own_folder
from llmq.ptq.held_out import measure
from llmq.ptq.job import Job
from llmq.ptq.methods import method_of
from llmq.ptq.outside import OutsideReader, quantize_table, report_table
from llmq.ptq.pair import Pair
from llmq.ptq.ranks import ONE, Ranks
from llmq.ptq.report import build_report, outside_of_blocks
from llmq.ptq.results import BlockReport, EarlierRun
from llmq.ptq.scale_run import ScaleRun
from llmq.ptq.sink import FolderSink
from llmq.reports import page
from llmq.storage import files
from llmq.storage.attempt import kept_for_later
from llmq.storage.boundary import running
from llmq.storage.partial_checkpoint import PartialCheckpoint
from llmq.storage.room import Room
from llmq.storage.workspace import check_output, work_dir_of

MAX_FALLBACK_SHARE = 0.05
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def identity(job: Job, device: str) -> dict[str, Any]:
    """What decides the bytes of the result: an interrupted run with the same identity is
    continued."""
    return {
        "model": {
            "folder": str(files.real_path(job.source.folder)),
            "size and time of": files.stamps(set(job.source.shards.names.values())),
            "contents of": job.source.files.contents(),
        },
        # What the text says decides, not what it is called.
        "recipe": replace(job.recipe, calibration=None).to_json(),
        "format": job.fmt.name,
        "calibration text": None if job.tokens is None else job.tokens.sha256,
        "software or machine": {
            "llmq": llmq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": device,
            "precision": str(job.precision(device)),
        },
    }


@dataclass(frozen=True)
class Attempt:
    """One of several results of which one is kept. variant: tells their work folders apart.
    is_trial: what it loses is measured, and the result waits. later_bytes: what results take that
    are made while it waits. started: when the whole began, where that was earlier
    (`time.monotonic`). resumed_at: the first block that was not there when the whole began, where
    it was a trial by now. about: further keys of the report."""

    variant: str = ""
    is_trial: bool = False
    later_bytes: int = 0
    started: float | None = None
    resumed_at: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def place(self, out_dir: Path) -> Path:
        """What the work folder is named after."""
        out_dir = files.real_path(out_dir)
        return out_dir.with_name(out_dir.name + self.variant)


def quantize_folder(
    job: Job,
    out_dir: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    max_ram: int | None = None,
    attempt: Attempt = Attempt(),
    ranks: Ranks = ONE,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    on_step: OnStep = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run a job into a folder and return its report. Continues an interrupted run of the same job.
    Peak memory is one block. Of a trial, the report has what was lost ("held_out") and where it
    began ("resumed_at_block").

    max_ram: bytes that a process may take beside the libraries; what is left of them holds hidden
    states, and None leaves these to files. ranks: the processes that share the work, all of which
    call this; the report is the first one's, empty in others. on_start: told how many blocks are
    finished already, of how many. on_step: the same of what is done before and after all blocks, by
    its name. Raises `LlmqError` for bad input (nothing is left behind), `VerificationError` when
    the result fails its checks."""
    check_shared(job, ranks)
    room = Room(room_bytes(job, max_ram))
    if not ranks.is_first:
        _follow(job, out_dir, device, ranks, room)
        return {}
    check_output(out_dir, overwrite)
    started = time.monotonic() if attempt.started is None else attempt.started
    prefix, blocks = find_blocks(job.model)
    reader = CheckpointReader(job.model, job.source.tensors, job.source.files)
    partial = PartialCheckpoint(attempt.place(out_dir), identity(job, device), len(blocks))
    with kept_for_later(partial, lambda: all(map(reader.is_still, partial.sources()))):
        sink = FolderSink(partial, reader, job.fmt, job.all_plans, job.recipe)
        _forget_other_weights(partial, reader)
        scale_run = ScaleRun(job, sink, partial, device)
        scale_run.forget_mixture()
        first_block, damaged = partial.n_finished, partial.damaged
        if first_block == 0:
            files.check_space(partial.work_dir, disk_bytes(job) + attempt.later_bytes)
        ranks.check_same(identity(job, device))
        on_start(first_block - len(damaged), len(blocks))
        if job.outside:  # first, for the blocks are measured behind the embeddings that are stored
            _write_outside(job, partial, reader, prefix)
        earlier = earlier_run(ranks, EarlierRun(sink, first_block, damaged))
        task = _task(job, reader, device, earlier, ranks, room)
        folder = own_folder(ranks, partial.work_dir)
        running(job.source.folder)(quantize_blocks)(
            task, sink, folder, earlier=earlier, on_block=on_block, on_step=on_step
        )
        room.clear()
        sent = ranks.gathered(ranks.traffic.sent)
        resumed_at = min(first_block, *damaged) if damaged else first_block
        if job.outside:  # it may have been forgotten with a block that was done again
            _write_outside(job, partial, reader, prefix)
        trained = None
        if job.recipe.scale_steps:
            trained = scale_run.run(lambda done, total: on_step("scales", done, total))
        measured: dict[str, Any] = {
            "processes": {"n": ranks.size, "sent_bytes": sum(sent)},
            "hidden_states": {"memory_bytes": room.peak, "written_bytes": room.on_disk},
            "scale_tuning": trained,
            "held_out": _held_out(job, sink, partial, device),
        }
        if attempt.is_trial:
            partial.keep_only_blocks()
            partial.close()
            return {**measured, "resumed_at_block": resumed_at}
        if attempt.resumed_at is not None:
            resumed_at = attempt.resumed_at
        partial.out_dir = files.real_path(out_dir)
        measured |= attempt.about
        report = _finish(
            job, partial, reader, prefix, resumed_at, time.monotonic() - started, device, measured
        )
    _check_fallbacks(report, out_dir)
    return report


def _follow(job: Job, out_dir: Path, device: str, ranks: Ranks, room: Room) -> None:
    """The part of a process behind the first one: all of the work, and nothing of the output."""
    reader = CheckpointReader(job.model, job.source.tensors, job.source.files)
    ranks.check_same(identity(job, device))
    earlier = earlier_run(ranks, None)
    task = _task(job, reader, device, earlier, ranks, room)
    work_dir = own_folder(ranks, work_dir_of(files.real_path(out_dir)))
    running(job.source.folder)(quantize_blocks)(task, Follower(), work_dir, earlier=earlier)
    files.remove(work_dir)  # before the first process goes on, which cleans up around it
    with suppress(OSError):  # the first process's, where it sees the same disk
        work_dir.parent.rmdir()
    ranks.gathered(ranks.traffic.sent)


def _forget_other_weights(partial: PartialCheckpoint, reader: CheckpointReader) -> None:
    """Start over where the source holds other weights than those that blocks were made of."""
    if not all(map(reader.is_still, partial.sources())):
        partial.forget_all(
            "the weights of the source are not those that the finished blocks were made of, "
            "though size and time of its files are the same"
        )


def _task(
    job: Job,
    reader: CheckpointReader,
    device: str,
    earlier: EarlierRun,
    ranks: Ranks,
    room: Room,
) -> Task:
    """What the blocks of a job are quantized by; embeddings and head as they are stored behind
    them."""
    tokens, outside = job.tokens, None
    if job.outside:
        number = len(find_blocks(job.model)[1])  # that they have behind the blocks
        outside = OutsideReader(reader, lambda: earlier.finished.read_block(number).quantized)
    return Task(
        job.model,
        reader,
        job.recipe,
        job.plans,
        None if tokens is None else tokens.tokens,
        device,
        job.precision(device),
        _special_ids(job),
        outside,
        None if tokens is None else tokens.pictures,
        ranks,
        room,
    )


def _check_fallbacks(report: dict[str, Any], out_dir: Path) -> None:
    """Raise `VerificationError` where too many layers are rounded for want of anything better."""
    n_fallbacks, n_layers = len(report["fallbacks"]), len(report["layers"])
    if n_fallbacks > MAX_FALLBACK_SHARE * n_layers:
        raise VerificationError(
            f"{out_dir}: written, but {n_fallbacks} of {n_layers} layers fell back to plain "
            f"rounding, the first being {report['fallbacks'][0]}; use more or other calibration "
            "text"
        )


def _held_out(
    job: Job, sink: FolderSink, partial: PartialCheckpoint, device: str
) -> list[dict[str, Any]]:
    """What the stored blocks cost on text that they were not calibrated on."""
    if job.tokens is None or not job.tokens.held_out:
        return []
    special = special_ids(job.config, job.source.tokenizer)
    pair = Pair.of_run(job, sink, device)
    return measure(pair, job.tokens.held_out, partial.work_dir, special=special)


def _special_ids(job: Job) -> frozenset[int]:
    """Tokens that block-wise tuning watches on their own."""
    if not method_of(job.recipe).needs(job.recipe).tuning:
        return frozenset()
    return special_ids(job.config, job.source.tokenizer)


def _finish(
    job: Job,
    partial: PartialCheckpoint,
    reader: CheckpointReader,
    prefix: str,
    resumed_at: int,
    seconds: float,
    device: str,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Write everything that is not a block, then publish. measured: further keys of the report."""
    partial.keep_only_blocks()
    _write_outside(job, partial, reader, prefix)
    copied = {name: reader.shards.shapes[name] for name in reader.unused()}
    target = partial.checkpoint_dir
    shards = partial.pack()
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensors in shards.values() for tensor in tensors.values())
        files.write_index(target, shards, total)
    companions = copy_companions(job.source.folder, target, job.source.weight_names)
    job.source.files.check()  # what was copied and read is what the run began with
    report = build_report(
        job,
        partial.block_reports(),
        source_bytes=job.source.weight_bytes,
        stored_bytes=sum((target / name).stat().st_size for name in shards),
        copied=list(copied),
        resumed_at=resumed_at,
        seconds=seconds,
        device=device,
    )
    report |= outside_of_blocks(job, partial.report_of(partial.outside))
    base = base_of(job.source.folder)
    report |= {RECORD: base.to_json(), "redone_blocks": partial.redone}
    report |= measured
    report |= {**companions.to_json(), FINGERPRINT: _tokenizer_hash(job)}
    files.write_json(target / "report.json", report)
    write_card(target, report, base, partial.out_dir.name)
    page.write_beside(target)
    write_configs(
        target,
        job.config,
        checkpoint_config(
            job.fmt,
            job.all_plans,
            act_order=job.recipe.order == "act",
            activations=job.recipe.activations,
            kept=[*kept_matrices(job.model), *matrices_among(copied)],
            stored=job.stored,
        ),
        name=hub_id(job.source.folder),
        companions=companions,
    )
    partial.publish()
    return report


def _write_outside(
    job: Job, partial: PartialCheckpoint, reader: CheckpointReader, prefix: str
) -> None:
    """Keep embeddings, norms and head as they are, but for those that are to be quantized, and
    everything else that is stored, whether or not the model has a place for it."""
    if partial.is_finished(partial.outside):
        return
    tables, reports = _quantized_tables(job, reader)
    outside = [
        name
        for name in reader.names
        if not name.startswith(prefix + ".")
        and name not in compat.ties(job.model)
        and name.removesuffix(".weight") not in tables
    ]
    tensors = reader.stored_names(reader.read_parameters(outside))
    roles = {plan.layer.name: plan.role for plan in job.outside}
    for name, table in tables.items():
        fmt = job.fmt.for_role(roles[name])
        tensors |= reader.stored_names(layer_tensors(name, table, fmt))
    for _ in partial.written(partial.outside, tensors):
        pass
    if reader.unused():
        with places_of_others(reader, partial.work_dir) as places:
            partial.add(partial.outside, places)
    partial.finish_block(partial.outside, {"tables": reports}, reader.take_read())


def _quantized_tables(
    job: Job, reader: CheckpointReader
) -> tuple[dict[str, QuantizedTensor], list[dict[str, Any]]]:
    """Embeddings and head, rounded, by name of module, and what became of each."""
    tables, reports = {}, []
    weight_of = weight_reader(job.model, reader)
    for plan in job.outside:
        assert plan.spec is not None
        weight = weight_of(plan.layer.name)
        tables[plan.layer.name] = quantize_table(weight, plan.spec)
        reports.append(report_table(plan, weight, tables[plan.layer.name]))
    return tables, reports


def _tokenizer_hash(job: Job) -> str | None:
    """The vocabulary that the output comes with, None where the source has no tokenizer."""
    if job.tokens is not None and job.tokens.tokenizer_sha256 is not None:
        return job.tokens.tokenizer_sha256
    try:
        return fingerprint(job.source.tokenizer)
    except LlmqError:
        return None
