"""Tensors of safetensors files, one by one.

Weights are never loaded as a whole. The reader opens a shard, copies the tensors that are asked for
and closes it again, because mapped pages count as resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmq.errors import LlmqError
from llmq.storage.boundary import check_regular, reading
from llmq.storage.json_files import read_object

Slices = Callable[[str], Any]
"""Of a stored tensor's name: its slice of safetensors, which reads the parts that are indexed."""

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}  # of a number, by the bits in its dtype's name


class ShardReader:
    """Tensors of a folder of safetensors by name. `names`: every tensor, with the file that holds
    it; `shapes`, `dtypes`: its shape and what safetensors calls its dtype. `start`: the file to
    begin with, the index or the one that holds all. stated: the object in config.json, where that
    has been read already. Every fault of the files is a `LlmqError` that names the file."""

    def __init__(self, model_dir: Path, stated: dict[str, Any] | None = None) -> None:
        self.model_dir = model_dir
        self._stated = stated
        self.names: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._scan()

    def _scan(self) -> None:
        # What the config names, then one file, then an index that lies beside it, as transformers
        # does: both must read the same weights.
        single = self.model_dir / (self._named_by_config() or "model.safetensors")
        if single.name.endswith(".index.json"):
            paths = self._indexed_files(single)
        elif single.is_file():
            paths = [single]
        elif (self.model_dir / INDEX).is_file():
            paths = self._indexed_files(self.model_dir / INDEX)
        else:
            paths = sorted(self.model_dir.glob("*.safetensors"))
            paths = paths if len(paths) == 1 else []
        if not paths:
            pickles = (
                " (only pickled weights, which can run code and are not read: convert them to "
                "safetensors first)"
                if list(self.model_dir.glob("*.bin"))
                else ""
            )
            raise LlmqError(f"{self.model_dir}: no model.safetensors and no {INDEX}{pickles}")
        self.start = single.name if single.name.endswith(".index.json") else INDEX
        if len(paths) == 1:
            self.start = paths[0].name
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self.names:
                    raise LlmqError(
                        f"{path}: tensor {name} is also in {self.names[name].name}; the folder "
                        "mixes two models"
                    )
                self.names[name] = path
                self.shapes[name] = entry["shape"]
                self.dtypes[name] = entry["dtype"]

    def _named_by_config(self) -> str | None:
        """The file that config.json names as the one to load, which transformers goes by."""
        path = self.model_dir / "config.json"
        if self._stated is None:
            self._stated = read_object(path, "a model config") if path.is_file() else {}
        name = self._stated.get("transformers_weights")
        if name is None:
            return None
        if (
            not isinstance(name, str)
            or not _is_plain(name)
            or not name.endswith((".safetensors", ".safetensors.index.json"))
            or not (self.model_dir / name).is_file()
        ):
            raise LlmqError(
                f"{path}: transformers_weights is {str(name)[:80]!r}, expected the plain name of a "
                ".safetensors file or its index in the same folder"
            )
        return name

    def _indexed_files(self, index: Path) -> list[Path]:
        data = read_object(
            index, "a safetensors index", max_bytes=MAX_INDEX_BYTES, unique_keys=True
        )
        for key in ("weight_map", "metadata"):  # transformers asks for both
            if not isinstance(data.get(key), dict):
                raise LlmqError(
                    f"{index}: not a safetensors index: expected an object '{key}'; download it "
                    "again"
                )
        weight_map = data["weight_map"]
        file_names = sorted(set(map(_text, weight_map.values())))
        for file_name in file_names:
            if not _is_plain(file_name):
                raise LlmqError(
                    f"{index}: refers to {file_name!r}; expected plain names of .safetensors files "
                    "in the same folder"
                )
            if not (self.model_dir / file_name).is_file():
                raise LlmqError(
                    f"{index}: refers to {file_name}, which is missing; download the model again"
                )
        return [self.model_dir / file_name for file_name in file_names]

    def bytes_of(self, name: str) -> int:
        """Bytes of a stored tensor; of a dtype that is not known here, as many as its elements."""
        return prod(self.shapes[name]) * _BYTES.get(self.dtypes[name].lstrip("BFIU"), 1)

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor lies in its file as it is read."""
        return True

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The names that `as_stored` gives."""
        return (name,)

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor in full precision under the names that its parts are stored by: its own, but for
        views of several."""
        return {name: tensor}

    def paths_of(self, names: Iterable[str]) -> set[Path]:
        """The files that hold the named tensors."""
        return {self.names[name] for name in names}

    def slices(self, stack: ExitStack) -> Slices:
        """Slices of tensors whose files stay open for as long as the stack. A file that cannot be
        read raises as safetensors has it."""
        opened: dict[Path, Any] = {}

        def of(name: str) -> Any:
            path = self.names[name]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path].get_slice(name)

        return of

    @staticmethod
    def names_in(path: Path) -> list[str]:
        """The tensors of one file."""
        return list(read_header(path))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors. Raises `LlmqError` for a damaged file and for NaN or
        infinite values, naming the tensor."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.names[name], []).append(name)
        for path, wanted in by_file.items():
            with (
                reading(path, "damaged", "download it again"),
                safe_open(path, framework="pt") as shard,
            ):
                for name in wanted:
                    tensors[name] = shard.get_tensor(name).clone()
        for name, tensor in tensors.items():
            check_finite(f"{self.names[name]}: tensor {name}", tensor)
        return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `LlmqError` for NaN or infinite values."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LlmqError(
            f"{name} holds {int((~torch.isfinite(tensor)).sum())} NaN or infinite values of "
            f"{tensor.numel()}; the weights are damaged: download or convert the model again"
        )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape} of a safetensors file, without its data. Raises `LlmqError` when the
    file is damaged."""
    check_regular(path)
    with (
        reading(path, "not a readable safetensors file", "download it again"),
        safe_open(path, framework="pt") as shard,
    ):
        stored = shard.keys()
        slices = {name: shard.get_slice(name) for name in stored}
        return {
            name: {"dtype": part.get_dtype(), "shape": tuple(part.get_shape())}
            for name, part in slices.items()
        }


def _text(file_name: object) -> str:
    """What an index says in the place of a file name, as text."""
    return file_name if isinstance(file_name, str) else repr(file_name)


def _is_plain(file_name: str) -> bool:
    """Whether a name from an index is that of a file beside it."""
    return (
        Path(file_name).name == file_name
        and file_name.endswith(".safetensors")
        and file_name.isprintable()
        and len(os.fsencode(file_name)) < 256
    )
