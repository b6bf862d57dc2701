"""Quantize a folder into a folder, or a model in memory: the engine joined to where weights come
from and go to."""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import llmq
from llmq.activations.keys_values import quantize_kv
from llmq.errors import LlmqError, LlmqWarning, VerificationError
from llmq.evaluation.position_classes import special_ids
from llmq.formats.base import Format
from llmq.formats.hf_quantizer import state_quantization
from llmq.formats.registry import choose_format, format_note
from llmq.formats.save import checkpoint_config, layer_tensors, write_configs
from llmq.grid.spec import ActSpec
from llmq.inference.module import quantized_modules, swap
from llmq.inference.settings import read_settings
from llmq.models.arch import check_length, find_blocks, quantizable_layers, weight_as_stored
from llmq.models.companions import copy_companions
from llmq.models.identity import hub_id
from llmq.models.names import check_dtypes, check_shapes, match_names
from llmq.models.shards import ShardReader, check_finite
from llmq.models.source import (
    load_config,
    load_tokenizer,
    meta_model,
    resolve,
)
from llmq.models.stored import is_text_part, source_model, source_remarks, state_ties
from llmq.models.tokens import FINGERPRINT, fingerprint, first_token, model_tokenizer
from llmq.ptq.budget import stored_bytes, work_bytes
from llmq.ptq.engine import BlockReport, BlockResult, Engine, StoredBlock
from llmq.ptq.precision import Precision
from llmq.ptq.report import build_report, model_card
from llmq.ptq.scales import fitting_plans
from llmq.recipe import LayerPlan, Recipe
from llmq.storage import files
from llmq.storage.boundary import running
from llmq.storage.stamps import SourceChangedError, SourceFiles
from llmq.storage.workspace import PartialCheckpoint, check_output
from llmq.text import documents
from llmq_kernels.core import restricted

MAX_FALLBACK_SHARE = 0.05
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointReader:
    """Weights by model parameter name from a folder of safetensors. source: its files as they were
    when the run began, where that is to be checked."""

    def __init__(
        self, model: PreTrainedModel, shards: ShardReader, source: SourceFiles | None = None
    ) -> None:
        self.shards, self.source = shards, source
        self._read: dict[str, str] = {}  # hash by stored name, since the last block was finished
        self.names = match_names(model, shards.names)

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        stored = {self.names[name]: name for name in names if name in self.names}
        paths = {self.shards.names[name] for name in stored}
        try:
            tensors = self.shards.read(stored)
        finally:  # a file that is another by now is the reason of whatever went wrong
            if self.source is not None:
                self.source.check(paths)
        if self.source is not None:
            self._read |= {name: _hash(tensor) for name, tensor in tensors.items()}
        return {stored[name]: tensor for name, tensor in tensors.items()}

    def take_read(self) -> dict[str, Any]:
        """What was read since the last call: hashes of the tensors, inodes of their files."""
        read, self._read = self._read, {}
        paths = {self.shards.names[name] for name in read}
        return {"inodes": self.source.inodes(paths) if self.source else {}, "tensors": read}

    def is_still(self, before: dict[str, Any]) -> bool:
        """Whether what was read for a finished block is what is there now. Where inodes are the
        same, so are the contents."""
        paths = {self.shards.names[name] for name in before["tensors"]}
        if self.source is None or self.source.inodes(paths) == before["inodes"]:
            return True
        now = self.shards.read(before["tensors"])
        return all(_hash(now[name]) == before["tensors"][name] for name in now)

    def stored_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names that the source uses, which other engines know: packed
        tensors take the place of `NAME.weight`."""
        renamed = {}
        for name, tensor in tensors.items():
            layer, _, suffix = name.rpartition(".")
            packed = name not in self.names
            renamed[
                f"{self.names[f'{layer}.weight'].removesuffix('.weight')}.{suffix}"
                if packed
                else self.names[name]
            ] = tensor
        return renamed

    def unused(self) -> list[str]:
        """Stored tensors that belong to no parameter of the model: old buffers, heads for other
        tasks."""
        return sorted(set(self.shards.names) - set(self.names.values()))


def _hash(tensor: Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


class ModelReader:
    """Weights by parameter name from a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.state = model.state_dict()

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.state[name].detach().clone() for name in names if name in self.state}


@dataclass(frozen=True)
class Job:
    """Everything known before anything is computed. tokens: None for methods without data. remarks:
    what is to be known of the model or the format. source: the files of the model as they were
    before any was read."""

    model_dir: Path
    config: PretrainedConfig
    model: PreTrainedModel
    shards: ShardReader
    recipe: Recipe
    plans: list[LayerPlan]
    fmt: Format
    tokens: documents.TokenSet | None
    remarks: dict[str, str]
    source: SourceFiles

    @property
    def notes(self) -> dict[str, str]:
        """Layers that differ from what was asked, and the remarks."""
        return {plan.layer.name: plan.note for plan in self.plans if plan.note} | self.remarks

    def precision(self, device: str) -> Precision:
        """What the parts of the run are computed in on a device."""
        return Precision.of(self.config, self.recipe, device)


def prepare(
    model: str,
    recipe: Recipe,
    *,
    calibration: str | documents.TokenSet = documents.BUNDLED,
    format: str = "auto",
    revision: str | None = None,
    strict: bool = False,
    check_scales: bool = True,
) -> Job:
    """Resolve and check everything that can be checked before computing: model, names of all
    tensors, rules, format, calibration text. Raises `LlmqError`.

    calibration: where the text is, or windows of tokens that are there already. check_scales: read
    the weights of all layers once, to give each a scale dtype that holds its scales; without, what
    is planned is float16 as it was asked for.
    """
    restricted.adapt()
    model_dir = resolve(model, revision)
    source = SourceFiles.of(model_dir)
    stored_config = load_config(model_dir)
    read_settings(model_dir)  # it comes along, and the result has to load
    if getattr(stored_config, "quantization_config", None) is not None:
        raise LlmqError(
            f"{model_dir}: is quantized already ({_method(stored_config)}); start from the "
            "full-precision model"
        )
    shards = ShardReader(model_dir)
    config, skeleton = source_model(stored_config, shards)
    plans = recipe.plan(quantizable_layers(skeleton))
    if not any(plan.spec for plan in plans):
        raise LlmqError(
            f"none of the {len(plans)} linear layers would be quantized; see 'llmq plan' with the "
            "same options"
        )
    matched = match_names(skeleton, shards.names)
    check_shapes(skeleton, shards, matched)
    check_dtypes(skeleton, shards.dtypes, matched, str(model_dir))
    choose_format(format, plans, recipe.activations)  # or it is refused before weights are read
    if check_scales:
        plans, changed = fitting_plans(
            plans, _weight_of(skeleton, CheckpointReader(skeleton, shards))
        )
        _check_scale_format(format, plans, changed)
    fmt = choose_format(format, plans, recipe.activations)
    notes = [f"{plan.layer.name}: {plan.note}" for plan in plans if plan.note]
    if strict and notes:
        raise LlmqError(
            f"--strict: {len(notes)} layers would differ from what was asked, the first being "
            f"{notes[0]}"
        )
    remarks = {f"format {fmt.name}": note} if (note := format_note(fmt, plans)) else {}
    remarks |= source_remarks(skeleton, stored_config, config, shards, matched, strict)
    tokens = None
    if recipe.needs_calibration:
        tokens = (
            calibration_tokens(model_dir, config, recipe, calibration)
            if isinstance(calibration, str)
            else calibration
        )
    return Job(model_dir, config, skeleton, shards, recipe, plans, fmt, tokens, remarks, source)


def _weight_of(
    skeleton: PreTrainedModel, reader: CheckpointReader | ModelReader
) -> Callable[[str], Tensor]:
    """The weight `[N, K]` of a linear layer by name."""

    def weight_of(name: str) -> Tensor:
        (tensor,) = reader.read_parameters([f"{name}.weight"]).values()
        return weight_as_stored(skeleton.get_submodule(name), tensor)

    return weight_of


def _check_scale_format(format: str, plans: list[LayerPlan], changed: list[str]) -> None:
    """Refuse a format that was asked for and whose scales are float16, for layers that need
    others."""
    if changed and format not in ("auto", "llmq"):
        note = next(plan.note for plan in plans if plan.layer.name == changed[0])
        raise LlmqError(
            f"format {format} cannot hold {changed[0]} ({note}), nor {len(changed) - 1} other "
            "layers: its scales are float16. Use --format llmq, which holds everything, or keep "
            f"them with --rule '{changed[0]}=keep'"
        )


def _method(config: Any) -> str:
    settings = config.quantization_config
    if isinstance(settings, dict):
        return str(settings.get("quant_method"))
    return str(getattr(settings, "quant_method", settings))


def calibration_tokens(
    model_dir: Path, config: Any, recipe: Recipe, source: str
) -> documents.TokenSet:
    """The calibration windows of a recipe for a model folder."""
    tokenizer = model_tokenizer(model_dir, config)
    check_length(config, recipe.sequence_length, f"--sequence-length {recipe.sequence_length}")
    return windows(tokenizer, config, recipe, source)


def windows(
    tokenizer: PreTrainedTokenizerBase, config: Any, recipe: Recipe, source: str
) -> documents.TokenSet:
    """Seeded windows of a text, each with a BOS token for the families that need it."""
    row = documents.tokenize(documents.load_documents(source, "calibration"), tokenizer)
    documents.check_vocabulary(row, config.get_text_config().vocab_size, source)
    bos = first_token(tokenizer, config)
    found = documents.calibration_windows(
        row, recipe.samples, recipe.sequence_length, recipe.seed, source, bos
    )
    return replace(found, tokenizer_sha256=fingerprint(tokenizer))


def _identity(job: Job, device: str) -> dict[str, Any]:
    """What decides the bytes of the result: an interrupted run with the same identity is
    continued."""
    return {
        "model": {
            "folder": str(job.model_dir.resolve()),
            "size and time of": files.stamps(set(job.shards.names.values())),
            "contents of": job.source.contents(),
        },
        "recipe": job.recipe.to_json(),
        "format": job.fmt.name,
        "calibration text": None if job.tokens is None else job.tokens.sha256,
        "software or machine": {
            "llmq": llmq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
            "device": device,
            "precision": str(job.precision(device)),
        },
    }


def quantize_folder(job: Job, out_dir: Path, *, device: str = "cpu", overwrite: bool = False, on_start: Callable[[int, int], None] = lambda done, total: None,
                    on_block: Callable[[BlockReport], None] = lambda report: None) -> dict[str, Any]:  # fmt: skip
    """Run a job into a folder and return its report. Continues an interrupted run of the same job.
    Peak memory is one block.

    on_start: told how many blocks are finished already, of how many. Raises `LlmqError` for bad
    input (nothing is left behind), `VerificationError` when the result fails its checks."""
    check_output(out_dir, overwrite)
    started = time.monotonic()
    prefix, blocks = find_blocks(job.model)
    reader = CheckpointReader(job.model, job.shards, job.source)
    partial = PartialCheckpoint(out_dir, _identity(job, device), len(blocks) + 1)
    try:
        sink = _FolderSink(partial, reader, job.fmt, job.plans, job.recipe)
        if not all(map(reader.is_still, partial.sources())):
            partial.forget_all(
                "the weights of the source are not those that the finished blocks were made of, "
                "though size and time of its files are the same"
            )
        first_block, damaged = partial.n_finished, partial.damaged
        if first_block == 0:
            files.check_space(partial.work_dir, stored_bytes(job) + work_bytes(job))
        on_start(first_block - len(damaged), len(blocks))
        tokens = None if job.tokens is None else job.tokens.tokens
        engine = Engine(
            job.model,
            reader,
            job.recipe,
            job.plans,
            tokens,
            partial.work_dir,
            sink.store,
            sink.seal,
            on_block,
            device,
            job.precision(device),
            finished=sink,
            special_ids=_special_ids(job),
        )
        running(job.model_dir)(engine.run)(first_block, damaged)
        resumed_at = min(first_block, *damaged) if damaged else first_block
        report = _finish(
            job, partial, reader, prefix, resumed_at, time.monotonic() - started, device
        )
    except files.DamagedError:
        partial.close()
        raise
    except SourceChangedError as error:
        is_same = error.may_be_same and all(map(reader.is_still, partial.sources()))
        (partial.close if is_same else partial.discard)()
        raise
    except (files.WriteError, OSError) as error:  # OSError: of activations, reports or the manifest
        partial.close()
        known = (
            error
            if isinstance(error, files.WriteError)
            else files.unwritable(error.filename or partial.work_dir, error.strerror or error)
        )
        raise files.WriteError(f"{known}, which continues where it stopped") from None
    except LlmqError:
        partial.discard()
        raise
    except BaseException:
        partial.close()
        raise
    n_fallbacks, n_layers = len(report["fallbacks"]), len(report["layers"])
    if n_fallbacks > MAX_FALLBACK_SHARE * n_layers:
        raise VerificationError(
            f"{out_dir}: written, but {n_fallbacks} of {n_layers} layers fell back to plain "
            f"rounding, the first being {report['fallbacks'][0]}; use more or other calibration "
            "text"
        )
    return report


def _special_ids(job: Job) -> frozenset[int]:
    """Tokens that block-wise tuning watches on their own."""
    if job.recipe.method != "blockwise":
        return frozenset()
    return special_ids(job.config, load_tokenizer(job.model_dir))


class _FolderSink:
    """Stores blocks as shards and reads them back."""

    def __init__(
        self,
        partial: PartialCheckpoint,
        reader: CheckpointReader,
        fmt: Format,
        plans: list[LayerPlan],
        recipe: Recipe,
    ) -> None:
        self.partial, self.reader, self.fmt, self.plans = partial, reader, fmt, plans
        self.config = checkpoint_config(
            fmt, plans, act_order=recipe.order == "act", activations=recipe.activations
        )

    def store(self, result: BlockResult) -> StoredBlock:
        packed = {
            name: layer_tensors(name, qtensor, self.fmt)
            for name, qtensor in result.quantized.items()
        }
        tensors = dict(result.kept)
        for parts in packed.values():
            tensors.update(parts)
        written = self.partial.write_shard(result.report.index, self.reader.stored_names(tensors))
        read_back = {}
        for name, parts in packed.items():
            stored = {
                full.rpartition(".")[2]: written[next(iter(self.reader.stored_names({full: part})))]
                for full, part in parts.items()
            }
            read_back[name] = self.fmt.read(name, stored, self.config, result.quantized[name].shape)
            read_back[name].validate(name)
        kept = {
            name: written[next(iter(self.reader.stored_names({name: tensor})))]
            for name, tensor in result.kept.items()
        }
        return StoredBlock(read_back, kept)

    def read_block(self, index: int) -> StoredBlock:
        """What is stored of a finished block, from its shard alone."""
        tensors = self.partial.read_shard(index)
        quantized = {}
        for plan in self.plans:
            name = plan.layer.name
            weight = self.reader.names[f"{name}.weight"]
            layer = weight.removesuffix("weight")
            if plan.spec is None or not any(key.startswith(layer) for key in tensors):
                continue
            own = {key for key in tensors if key.startswith(layer)}
            kept = (own & set(self.reader.names.values())) - {weight}  # its bias
            parts = {key.removeprefix(layer): tensors.pop(key) for key in own - kept}
            quantized[name] = self.fmt.read(name, parts, self.config, plan.layer.shape)
            quantized[name].validate(name)
        stored_names = self.reader.names.items()
        return StoredBlock(
            quantized, {name: tensors[stored] for name, stored in stored_names if stored in tensors}
        )

    def forget_after(self, index: int) -> None:
        self.partial.forget_after(index)

    def seal(self, report: BlockReport) -> None:
        self.partial.finish_shard(report.index, report.to_json(), self.reader.take_read())


def _finish(
    job: Job,
    partial: PartialCheckpoint,
    reader: CheckpointReader,
    prefix: str,
    resumed_at: int,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Write everything that is not a block, then publish."""
    partial.keep_only_shards()
    outside = [
        name
        for name in reader.names
        if not name.startswith(prefix + ".") and name not in job.model.all_tied_weights_keys
    ]
    last = partial.n_shards - 1
    unused = reader.unused()
    tensors = reader.stored_names(reader.read_parameters(outside))
    if is_text_part(job.model, job.config):  # the folder stays the wrapper that config.json says
        tensors |= job.shards.read(unused)
        unused = []
    for _ in partial.written(last, tensors):
        pass
    del tensors
    partial.finish_shard(last)
    target = partial.checkpoint_dir
    shards = {
        partial.shard_path(i).name: list(ShardReader.names_in(partial.shard_path(i)))
        for i in range(partial.n_shards)
    }
    files.write_index(target, shards, sum((target / name).stat().st_size for name in shards))
    weights = {job.shards.start, *(path.name for path in set(job.shards.names.values()))}
    companions = copy_companions(job.model_dir, target, weights)
    job.source.check()  # what was copied and read is what the run began with
    report = build_report(
        job, partial.block_reports(), source_bytes=sum(path.stat().st_size for path in set(job.shards.names.values())), stored_bytes=sum((target / name).stat().st_size for name in shards),
        unused=unused, resumed_at=resumed_at, seconds=seconds, device=device,
    )  # fmt: skip
    report["redone_blocks"] = partial.redone
    report |= {**companions.to_json(), FINGERPRINT: _tokenizer_hash(job)}
    files.write_json(target / "report.json", report)
    (target / "README.md").write_text(model_card(report))
    write_configs(
        target,
        job.config,
        checkpoint_config(
            job.fmt,
            job.plans,
            act_order=job.recipe.order == "act",
            activations=job.recipe.activations,
        ),
        name=hub_id(job.model_dir),
        companions=companions,
    )
    partial.publish()
    return report


def _tokenizer_hash(job: Job) -> str | None:
    """The vocabulary that the output comes with, None where the source has no tokenizer."""
    if job.tokens is not None and job.tokens.tokenizer_sha256 is not None:
        return job.tokens.tokenizer_sha256
    try:
        return fingerprint(load_tokenizer(job.model_dir))
    except LlmqError:
        return None


class _ModelSink:
    """Puts what became of a block into a model in memory once it is verified, each layer on the
    device of the one that it replaces."""

    def __init__(self, model: PreTrainedModel, activations: ActSpec) -> None:
        self.model, self.activations = model, activations
        self.pending = StoredBlock({}, {})
        self.reports: list[BlockReport] = []

    def store(self, result: BlockResult) -> StoredBlock:
        self.pending = StoredBlock(result.quantized, result.kept)
        return self.pending

    @torch.no_grad()
    def seal(self, report: BlockReport) -> None:
        state = self.model.state_dict()
        for name, tensor in self.pending.kept.items():
            state[name].copy_(tensor)
        swap(
            self.model,
            {
                name: qtensor.to(state[f"{name}.weight"].device)
                for name, qtensor in self.pending.quantized.items()
            },
            self.activations,
        )
        self.pending = StoredBlock({}, {})
        self.reports.append(report)


def device_of(model: PreTrainedModel) -> str:
    """Where a model in memory is quantized: on its device, or on the CPU if it is spread over
    several. Raises `LlmqError` for weights that are not in memory."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if away := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise LlmqError(
            f"{away[0]} has no data in memory, nor have {len(away) - 1} others (offloaded, or on "
            "the meta device); load the model without offloading, or quantize its folder: llmq "
            "quantize MODEL OUT"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else "cpu"


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> list[BlockReport]:
    """Quantize a model in memory, in place, and return the report of each block. Every layer stays
    on its device; a model that is on one device is quantized there, another on the CPU.

    tokens: calibration windows int64 `[n, length]` (see `llmq.text.documents.calibration_windows`); not
    needed for method "rtn". Raises `LlmqError` for bad input."""
    if quantized_modules(model):
        raise LlmqError(
            f"this {type(model).__name__} is quantized already; start from the full-precision model"
        )
    device = device_of(model)
    skeleton = meta_model(model.config)
    plans = recipe.plan(quantizable_layers(skeleton))
    reader = ModelReader(model)
    if tokens is not None:
        documents.check_windows(tokens, model.config.get_text_config().vocab_size)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in REAL:
            raise LlmqError(
                f"tensor {name} is {parameter.dtype}, expected {', '.join(map(str, REAL))}: start "
                "from the full-precision model"
            )
    for name, tensor in model.state_dict().items():
        check_finite(f"tensor {name}", tensor)
    plans, changed = fitting_plans(plans, _weight_of(skeleton, reader))
    if changed:
        note = next(plan.note for plan in plans if plan.layer.name == changed[0])
        warnings.warn(
            f"{len(changed)} layers differ from what was asked, the first being {changed[0]}: "
            f"{note}",
            LlmqWarning,
            stacklevel=2,
        )
    activations = recipe.activations
    quantize_kv(
        meta_model(model.config), activations.kv_bits, before_rope=activations.kv_before_rope
    )  # whether it can be done is known before anything changes
    sink = _ModelSink(model, recipe.activations)
    with tempfile.TemporaryDirectory(prefix="llmq-") as work_dir:
        precision = Precision.of(model.config, recipe, device)
        Engine(
            skeleton,
            reader,
            recipe,
            plans,
            tokens if recipe.needs_calibration else None,
            Path(work_dir),
            sink.store,
            sink.seal,
            on_block,
            device,
            precision,
            special_ids=special_ids(model.config),
        ).run()
    quantize_kv(model, activations.kv_bits, before_rope=activations.kv_before_rope)
    state_ties(model)
    state_quantization(model)
    return sink.reports
