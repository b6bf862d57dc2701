"""Quantize a folder into a folder, or a model in memory: the engine joined to where weights come
from and go to."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import llmq
from llmq import data
from llmq.errors import LlmqError, VerificationError
from llmq.formats import Format, choose_format, format_note
from llmq.formats.save import checkpoint_config, layer_tensors, write_configs
from llmq.kv import quantize_kv
from llmq.models.arch import check_length, find_blocks, needs_bos, quantizable_layers
from llmq.models.names import check_shapes, left_out, match_names
from llmq.models.shards import ShardReader, check_finite
from llmq.models.source import load_config, load_tokenizer, meta_model, resolve
from llmq.modules import quantized_modules, swap
from llmq.ptq.budget import stored_bytes, work_bytes
from llmq.ptq.engine import BlockReport, BlockResult, Engine
from llmq.ptq.precision import Precision
from llmq.ptq.report import build_report, model_card
from llmq.qtensor import QuantizedTensor
from llmq.recipe import LayerPlan, Recipe
from llmq.spec import ActSpec
from llmq.storage import files
from llmq.storage.stamps import SourceChangedError, SourceFiles
from llmq.storage.workspace import PartialCheckpoint, check_output

MAX_FALLBACK_SHARE = 0.05


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
        return {name: self.state[name].detach().cpu() for name in names if name in self.state}


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
    tokens: data.TokenSet | None
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
    calibration: str | data.TokenSet = data.BUNDLED,
    format: str = "auto",
    revision: str | None = None,
    strict: bool = False,
) -> Job:
    """Resolve and check everything that can be checked before computing: model, names of all
    tensors, rules, format, calibration text. Raises `LlmqError`.

    calibration: where the text is, or windows of tokens that are there already.
    """
    model_dir = resolve(model, revision)
    source = SourceFiles.of(model_dir)
    config = load_config(model_dir)
    if getattr(config, "quantization_config", None) is not None:
        raise LlmqError(
            f"{model_dir}: is quantized already ({_method(config)}); start from the full-precision model"
        )
    skeleton = meta_model(config)
    plans = recipe.plan(quantizable_layers(skeleton))
    if not any(plan.spec for plan in plans):
        raise LlmqError(
            f"none of the {len(plans)} linear layers would be quantized; see 'llmq plan' with the same options"
        )
    fmt = choose_format(format, plans, recipe.activations)
    notes = [f"{plan.layer.name}: {plan.note}" for plan in plans if plan.note]
    if strict and notes:
        raise LlmqError(
            f"--strict: {len(notes)} layers would differ from what was asked, the first being {notes[0]}"
        )
    shards = ShardReader(model_dir)
    matched = match_names(skeleton, shards.names)
    check_shapes(skeleton, shards, matched)
    remarks = {f"format {fmt.name}": note} if (note := format_note(fmt, plans)) else {}
    if unused := left_out(skeleton, sorted(set(shards.names) - set(matched.values()))):
        remarks["source tensors"] = (
            f"{len(unused)} of {len(shards.names)} are not used by {type(skeleton).__name__} as config.json describes it and are left out, the first being {unused[0]}"
        )
        if strict:
            raise LlmqError(f"--strict: {model_dir}: {remarks['source tensors']}")
    tokens = None
    if recipe.needs_calibration:
        tokens = (
            calibration_tokens(model_dir, config, recipe, calibration)
            if isinstance(calibration, str)
            else calibration
        )
    return Job(model_dir, config, skeleton, shards, recipe, plans, fmt, tokens, remarks, source)


def _method(config: Any) -> str:
    settings = config.quantization_config
    return str(
        settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    )


def calibration_tokens(model_dir: Path, config: Any, recipe: Recipe, source: str) -> data.TokenSet:
    """The calibration windows of a recipe for a model folder."""
    tokenizer = load_tokenizer(model_dir)
    check_length(config, recipe.sequence_length, f"--sequence-length {recipe.sequence_length}")
    return windows(tokenizer, config, recipe, source)


def windows(
    tokenizer: PreTrainedTokenizerBase, config: Any, recipe: Recipe, source: str
) -> data.TokenSet:
    """Seeded windows of a text, each with a BOS token for the families that need it."""
    row = data.tokenize(data.load_documents(source, "calibration"), tokenizer)
    data.check_vocabulary(row, config.get_text_config().vocab_size, source)
    bos = tokenizer.bos_token_id if needs_bos(config) else None
    return data.calibration_windows(
        row, recipe.samples, recipe.sequence_length, recipe.seed, source, bos
    )


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
                "the weights of the source are not those that the finished blocks were made of, though size and time of its files are the same"
            )
        first_block, damaged = partial.n_finished, partial.damaged
        if first_block == 0:
            files.check_space(partial.work_dir, stored_bytes(job) + work_bytes(job))
        on_start(first_block - len(damaged), len(blocks))
        tokens = None if job.tokens is None else job.tokens.tokens
        Engine(
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
        ).run(first_block, damaged)
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
            f"{out_dir}: written, but {n_fallbacks} of {n_layers} layers fell back to plain rounding, the first being {report['fallbacks'][0]}; use more or other calibration text"
        )
    return report


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

    def store(self, result: BlockResult) -> dict[str, QuantizedTensor]:
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
        return read_back

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor]]:
        """The kept tensors and the quantized layers of a finished block, from its shard alone."""
        tensors = self.partial.read_shard(index)
        kept = {
            name: tensors[stored] for name, stored in self.reader.names.items() if stored in tensors
        }
        packed = tensors.keys() - self.reader.names.values()
        quantized = {}
        for plan in self.plans:
            name = plan.layer.name
            layer = self.reader.names[f"{name}.weight"].removesuffix("weight")
            parts = {
                key.removeprefix(layer): tensors[key] for key in packed if key.startswith(layer)
            }
            if parts:
                quantized[name] = self.fmt.read(name, parts, self.config, plan.layer.shape)
                quantized[name].validate(name)
        return kept, quantized

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
    for _ in partial.written(last, reader.stored_names(reader.read_parameters(outside))):
        pass
    partial.finish_shard(last)
    target = partial.checkpoint_dir
    shards = {
        partial.shard_path(i).name: list(ShardReader.names_in(partial.shard_path(i)))
        for i in range(partial.n_shards)
    }
    files.write_index(target, shards, sum((target / name).stat().st_size for name in shards))
    files.copy_companions(job.model_dir, target)
    job.source.check()  # what was copied and read is what the run began with
    report = build_report(
        job, partial.block_reports(), source_bytes=sum(path.stat().st_size for path in set(job.shards.names.values())), stored_bytes=sum((target / name).stat().st_size for name in shards),
        unused=reader.unused(), resumed_at=resumed_at, seconds=seconds, device=device,
    )  # fmt: skip
    report["redone_blocks"] = partial.redone
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
    )
    partial.publish()
    return report


class _ModelSink:
    """Puts quantized layers into a model in memory once their block is finished."""

    def __init__(self, model: PreTrainedModel, activations: ActSpec) -> None:
        self.model, self.activations = model, activations
        self.pending: dict[str, QuantizedTensor] = {}
        self.reports: list[BlockReport] = []

    def store(self, result: BlockResult) -> dict[str, QuantizedTensor]:
        self.pending = result.quantized
        return result.quantized

    def seal(self, report: BlockReport) -> None:
        swap(self.model, self.pending, self.activations)
        self.reports.append(report)


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> list[BlockReport]:
    """Quantize a model in memory, in place, and return the report of each block.

    tokens: calibration windows int64 `[n, length]` (see `llmq.data.calibration_windows`); not
    needed for method "rtn". Raises `LlmqError` for bad input."""
    if quantized_modules(model):
        raise LlmqError(
            f"this {type(model).__name__} is quantized already; start from the full-precision model"
        )
    skeleton = meta_model(model.config)
    plans = recipe.plan(quantizable_layers(skeleton))
    if tokens is not None:
        data.check_windows(tokens, model.config.get_text_config().vocab_size)
    for name, tensor in model.state_dict().items():
        check_finite(f"tensor {name}", tensor)
    activations = recipe.activations
    quantize_kv(
        meta_model(model.config), activations.kv_bits, before_rope=activations.kv_before_rope
    )  # whether it can be done is known before anything changes
    sink = _ModelSink(model, recipe.activations)
    with tempfile.TemporaryDirectory(prefix="llmq-") as work_dir:
        precision = Precision.of(model.config, recipe, "cpu")
        Engine(
            skeleton,
            ModelReader(model),
            recipe,
            plans,
            tokens if recipe.needs_calibration else None,
            Path(work_dir),
            sink.store,
            sink.seal,
            on_block,
            precision=precision,
        ).run()
    quantize_kv(model, activations.kv_bits, before_rope=activations.kv_before_rope)
    return sink.reports
