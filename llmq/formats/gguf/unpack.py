"""A `.gguf` file as a model: unpacked once into a folder that everything else reads, in llmq's own
format for what is packed.

The folder lies in the cache (`$LLMQ_CACHE_DIR`, else `~/.cache/llmq`), one for each path, and is
made again when the file is another. It holds the same values as the file: blocks that llmq has a
code for run on its kernels, all others are multiplied out to bfloat16, and counted."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.gguf import blocks
from llmq.formats.gguf.container import GgufFile, StoredTensor
from llmq.formats.gguf.families import ROPE_FACTORS, Family, family_of_arch, restored
from llmq.formats.gguf.fields import Fields
from llmq.formats.gguf.settings import config_values
from llmq.formats.gguf.tensor_types import DENSE
from llmq.formats.gguf.tokenizer_files import tokenizer_files
from llmq.formats.gguf.weights import READ, weight_of
from llmq.formats.native import NATIVE
from llmq.grid.spec import QuantSpec
from llmq.storage import files
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_object
from llmq.storage.packing import MAX_SHARD_BYTES, shard_names
from llmq_kernels.core.cache import Unsafe, cache_dir, private_folder

STAMP = "gguf.json"  # what the folder was made of
VERSION = 1  # of the way that a folder is made
# Not among the layers that are packed in a folder.
_EMBEDDINGS = ("model.embed_tokens", "lm_head")


def unpacked(path: Path) -> Path:
    """The folder of a file, made now where it is not there. Warns of weights that are multiplied
    out. Raises `LlmqError` for a file that is damaged or of a kind that is not read."""
    folder = _folder_of(path)
    expected = _identity(path)
    stamp = _stamp(folder)
    if stamp is None or stamp.get("file") != expected:
        _make(path, folder, expected)
        stamp = _stamp(folder) or {}
    if dense := stamp.get("multiplied_out"):
        n = sum(dense.values())
        kinds = ", ".join(f"{count} x {kind}" for kind, count in dense.items())
        warnings.warn(
            f"{path}: {n} packed tensors run as bfloat16 or float16 ({kinds}), not on llmq's "
            "kernels",
            LlmqWarning,
            stacklevel=2,
        )
    return folder


def _folder_of(path: Path) -> Path:
    place = hashlib.sha256(str(files.real_path(path)).encode()).hexdigest()[:16]
    try:
        parent = private_folder(cache_dir() / "gguf" / place, create=True)
    except (Unsafe, OSError) as error:
        raise LlmqError(
            f"{path}: the folder to unpack it into cannot be used ({error}); set LLMQ_CACHE_DIR to "
            "one of your own"
        ) from None
    return parent / (path.stem or "model")


def _identity(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"version": VERSION, "bytes": status.st_size, "modified": status.st_mtime_ns}


def _stamp(folder: Path) -> dict[str, Any] | None:
    """What a folder was made of, None where it is not there as a whole."""
    try:
        return read_object(folder / STAMP, "a stamp of llmq")
    except LlmqError:
        return None


def _make(path: Path, folder: Path, identity: dict[str, int]) -> None:
    model = _Model.open(path)
    config, tokenizer = model.config(), tokenizer_files(model.fields)
    files.check_space(folder.parent, 2 * identity["bytes"])
    work = folder.with_name(f".{folder.name}.unpacking")
    files.remove(work)
    work.mkdir()
    try:
        for name, content in tokenizer.items():
            text = json.dumps(content, ensure_ascii=False)
            files.write_bytes(work / name, text.encode("utf-8", "surrogatepass"))
        written = _write_tensors(model, work)
        config["dtype"] = written.dtype
        if written.specs:
            config["quantization_config"] = NATIVE.write_config(dict(written.specs))
        files.write_json(work / "config.json", config)
        stamp = {
            "file": identity,
            "name": path.name,
            "types": dict(Counter(each.type.name for each in model.gguf.tensors.values())),
            "multiplied_out": dict(written.multiplied_out),
        }
        files.write_json(work / STAMP, stamp)
        files.remove(folder)
        work.replace(folder)
        files.sync_folder(folder.parent)
    except OSError as error:
        raise files.unwritable(folder, error.strerror or error) from None
    finally:
        files.remove(work)


@dataclass
class _Written:
    """specs: of packed layers, None for linear ones that are not. multiplied_out: packed tensors
    that became real numbers, by type. dtype: of the model."""

    specs: dict[str, QuantSpec | None] = field(default_factory=dict)
    multiplied_out: Counter[str] = field(default_factory=Counter)
    dtype: str = "bfloat16"


def _write_tensors(model: _Model, work: Path) -> _Written:
    """Write the shards, a few gigabytes at a time."""
    written = _Written()
    pending: dict[str, Tensor] = {}
    names: list[list[str]] = []
    total = size = 0
    for tensors in model.parameters(written):
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if pending and size + n_bytes > MAX_SHARD_BYTES:
            files.write_tensors(work / f"part-{len(names)}.safetensors", pending)
            names.append(list(pending))
            pending, size = {}, 0
        pending |= tensors
        size, total = size + n_bytes, total + n_bytes
    files.write_tensors(work / f"part-{len(names)}.safetensors", pending)
    names.append(list(pending))
    final = shard_names(len(names))
    for index, name in enumerate(final):
        (work / f"part-{index}.safetensors").replace(work / name)
    if len(final) > 1:
        files.write_index(work, dict(zip(final, names, strict=True)), total)
    return written


@dataclass(frozen=True)
class _Model:
    """A file whose architecture is known. names: of parameters -> those in the file."""

    gguf: GgufFile
    fields: Fields
    family: Family
    names: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> _Model:
        gguf = GgufFile(path)
        fields = Fields(gguf.fields, path)
        if (n_parts := fields.count("split.count", 1)) > 1:
            raise LlmqError(
                f"{path}: one of {n_parts} files; join them with llama.cpp's llama-gguf-split "
                "--merge"
            )
        family = family_of_arch(fields.text("general.architecture"))
        names = {}
        for stored in gguf.tensors:
            name = family.model_name(stored)
            if name is not None:
                names[name] = stored
            elif stored != ROPE_FACTORS:
                raise LlmqError(
                    f"{path}: tensor {stored} has no place in a {family.arch} model as llmq reads "
                    "it; take the model in safetensors"
                )
        return cls(gguf, fields, family, names)

    def config(self) -> dict[str, Any]:
        """The object in config.json, held against the tensors."""
        n_layers = self.fields.of(self.family.arch).count("block_count")
        if n_layers > len(self.names):
            raise self.fields.wrong("block_count", n_layers, f"at most {len(self.names)} layers")
        factors = None
        if ROPE_FACTORS in self.gguf.tensors:
            factors = self._values(self.gguf.tensors[ROPE_FACTORS])
        values = config_values(self.fields, self.family, set(self.names), factors)
        with reading(self.gguf.path, "does not describe a model", "take it in safetensors"):
            config = AutoConfig.for_model(self.family.model_type, **values).to_dict()
        architecture = {"gemma3_text": "Gemma3ForCausalLM"}.get(
            self.family.model_type, f"{self.family.model_type.title()}ForCausalLM"
        )
        return {**config, "architectures": [architecture]}

    def parameters(self, written: _Written) -> Iterator[dict[str, Tensor]]:
        """What is stored in the folder, a parameter at a time."""
        for name, stored in self.names.items():
            tensor = self.gguf.tensors[stored]
            layer = name.removesuffix(".weight")
            if tensor.type.name in DENSE:
                value = self._ordered(name, self._values(tensor))
                if self.family.is_norm(name):
                    value = value.float() - self.family.norm_offset
                if layer == "model.embed_tokens":
                    written.dtype = str(value.dtype).removeprefix("torch.")
                elif len(tensor.shape) == 2 and layer not in _EMBEDDINGS:
                    written.specs[layer] = None
                yield {name: value.contiguous()}
                continue
            yield self._packed(name, tensor, written)

    def _packed(self, name: str, tensor: StoredTensor, written: _Written) -> dict[str, Tensor]:
        """A packed tensor: as a weight for the kernels, else multiplied out."""
        layer = name.removesuffix(".weight")
        if len(tensor.shape) != 2 or not name.endswith(".weight"):
            raise LlmqError(
                f"{self.gguf.path}: tensor {tensor.name} of shape {list(tensor.shape)} is packed; "
                "only matrices are read"
            )
        shape = (tensor.shape[0], tensor.shape[1])
        rows = self._ordered(name, self.gguf.read(tensor.name).view(shape[0], -1))
        is_linear = layer not in _EMBEDDINGS
        if tensor.type.name in READ and is_linear:
            qtensor = weight_of(tensor.type.name, rows, shape)
            if qtensor is not None:
                qtensor.validate(f"{self.gguf.path}: {tensor.name}")
                written.specs[layer] = qtensor.spec
                return {f"{layer}.{suffix}": part for suffix, part in NATIVE.write(qtensor).items()}
        if is_linear:
            written.specs[layer] = None
        written.multiplied_out[tensor.type.name] += 1
        return {name: self._multiplied_out(tensor, rows, shape)}

    def _multiplied_out(self, tensor: StoredTensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        kind = tensor.type.name
        if kind in READ:
            return blocks.dequantize(kind, rows, shape).to(torch.bfloat16)
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise LlmqError(
                f"{self.gguf.path}: tensor {tensor.name} is of type {kind}, which llmq reads with "
                "the package gguf: pip install gguf"
            ) from None
        with reading(self.gguf.path, f"type {kind} cannot be read", "take another file"):
            values = dequantize(rows.numpy(), GGMLQuantizationType(tensor.type.number))
            return torch.from_numpy(values.copy()).view(shape).to(torch.bfloat16)

    def _values(self, tensor: StoredTensor) -> Tensor:
        """Real numbers as they are stored."""
        dtype = DENSE.get(tensor.type.name)
        if dtype is None:
            raise LlmqError(
                f"{self.gguf.path}: tensor {tensor.name} is of type {tensor.type.name}, expected "
                f"one of {', '.join(DENSE)}"
            )
        return self.gguf.read(tensor.name).view(dtype).view(tensor.shape)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows in transformers' order, packed or not."""
        model = self.fields.of(self.family.arch)
        n_heads = model.count("attention.head_count")
        n_kv_heads = model.count("attention.head_count_kv", n_heads)
        heads = self.family.permuted_heads(name, n_heads, n_kv_heads)
        if heads is None:
            return rows
        if not heads or rows.shape[0] % (2 * heads):
            raise LlmqError(
                f"{self.gguf.path}: {name} has {rows.shape[0]} rows, which {heads} heads do not "
                "divide; the file is damaged"
            )
        return restored(rows, heads)
