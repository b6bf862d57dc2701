"""The tensors of a folder as the model wants them that is quantized: in full precision, one for
each layer.

Most are stored that way. The others are *views*, made while they are read, a tensor at a time, of
what is stored: the weight of one expert out of a parameter that holds them all, a matrix out of its
codes and scales. Views may be made of views. Whoever is behind this (names, shapes, hashes, blocks)
sees the tensors of the model only, and `as_stored` says how one is stored that stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.models.shards import ShardReader, Slices, check_finite
from llmq.storage.boundary import reading

__all__ = ["Slices", "View", "ViewedTensors"]


class View(ABC):
    """One tensor of the model. stored: names of the tensors that it is made of, the one first whose
    file it is said to be in. shape, dtype: its own, as safetensors calls it. kind: what it is
    stored as, where it is decoded."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str | None:
        return None

    @abstractmethod
    def read(self, slices: Slices) -> Tensor:
        """A copy in memory."""

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The names that `as_stored` gives."""
        return (name,)

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is stored of a tensor that stays as it is, by name. name: that of the view."""
        return {name: tensor}

    def part(self, slices: Slices, index: Any) -> Tensor:
        """What indexing gives. A view that can read a part by itself does."""
        return self.read(slices)[index]


class _Parts:
    """Slices where what is stored may be a view itself. The last matrix that was made stays: gate
    and up of an expert are cut out of one, and decoding it is what reading them costs."""

    def __init__(self, views: Mapping[str, View], slices: Slices) -> None:
        self.views, self.slices = views, slices
        self._last: tuple[str, int] | None = None
        self._matrix: Tensor | None = None

    def __call__(self, name: str) -> Any:
        return _SliceOfView(self, name) if name in self.views else self.slices(name)

    def part(self, name: str, index: Any) -> Tensor:
        if not isinstance(index, int):
            return self.views[name].part(self.slices, index)
        if self._matrix is None or self._last != (name, index):
            self._matrix = self.views[name].part(self.slices, index)
            self._last = (name, index)
        return self._matrix


@dataclass(frozen=True)
class _SliceOfView:
    """Takes the place of a slice of safetensors."""

    parts: _Parts
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.parts.part(self.name, index)


class ViewedTensors(ShardReader):
    """`ShardReader` of the same files, with views in the place of what these are made of."""

    def __init__(self, shards: ShardReader, views: Mapping[str, View]) -> None:
        self.model_dir, self.start = shards.model_dir, shards.start
        self.shards, self.views = shards, dict(views)
        used = {name for view in views.values() for name in view.stored}
        direct = [name for name in shards.names if name not in used]
        self.names: dict[str, Path] = {name: shards.names[name] for name in direct}
        self.shapes = {name: shards.shapes[name] for name in direct}
        self.dtypes = {name: shards.dtypes[name] for name in direct}
        for name, view in views.items():
            self.names[name] = shards.names[view.stored[0]]
            self.shapes[name], self.dtypes[name] = view.shape, view.dtype

    def is_as_stored(self, name: str) -> bool:
        return name not in self.views and self.shards.is_as_stored(name)

    def parts_of(self, name: str) -> tuple[str, ...]:
        return self.views[name].parts_of(name) if name in self.views else (name,)

    def paths_of(self, names: Iterable[str]) -> set[Path]:
        """The files that hold what the named tensors are made of."""
        stored: set[str] = set()
        for name in names:
            stored |= set(self.views[name].stored if name in self.views else (name,))
        return self.shards.paths_of(stored)

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return self.views[name].as_stored(name, tensor) if name in self.views else {name: tensor}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors, as `ShardReader.read` gives them."""
        wanted = list(names)
        tensors = self.shards.read(name for name in wanted if name not in self.views)
        with ExitStack() as stack:
            slices = self.shards.slices(stack)
            for name in wanted:
                if name in self.views:
                    tensors[name] = self._made(name, slices)
        return tensors

    def slices(self, stack: ExitStack) -> Slices:
        return _Parts(self.views, self.shards.slices(stack))

    def _made(self, name: str, slices: Slices) -> Tensor:
        view, path = self.views[name], self.names[name]
        with reading(path, "damaged", "download it again"):
            tensor = view.read(slices)
        check_finite(f"{path}: tensor {name}, made of {', '.join(view.stored)},", tensor)
        return tensor
