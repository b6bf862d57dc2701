"""The tensors of a folder as the model wants them that is quantized: in full precision, one for
each layer.

Most are stored that way. The others are *views*, made while they are read, a tensor at a time, of
what is stored: the weight of one expert out of a parameter that holds them all. Whoever is behind
this (names, shapes, hashes, blocks) sees the tensors of the model only, and `stored_of` says what
each was made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llmq.models.shards import ShardReader, check_finite
from llmq.storage.boundary import reading

Slices = Callable[[str], Any]
"""Of a stored tensor's name: its slice of safetensors, which reads the parts that are indexed."""


class View(ABC):
    """One tensor of the model. stored: names of the tensors that it is made of, the one first whose
    file it is said to be in. shape, dtype: its own, as safetensors calls it."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, slices: Slices) -> Tensor:
        """A copy in memory."""

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is stored of a tensor that stays as it is, by name. name: that of the view."""
        return {name: tensor}


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

    def stored_of(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors that one is made of."""
        return self.views[name].stored if name in self.views else (name,)

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return self.views[name].as_stored(name, tensor) if name in self.views else {name: tensor}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors, as `ShardReader.read` gives them."""
        wanted = list(names)
        tensors = self.shards.read(name for name in wanted if name not in self.views)
        for name in wanted:
            if name in self.views:
                tensors[name] = self._made(name)
        return tensors

    def _made(self, name: str) -> Tensor:
        view, path = self.views[name], self.names[name]
        with ExitStack() as stack:
            stack.enter_context(reading(path, "damaged", "download it again"))
            opened: dict[Path, Any] = {}

            def slices(stored: str) -> Any:
                file = self.shards.names[stored]
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                return opened[file].get_slice(stored)

            tensor = view.read(slices)
        check_finite(f"{path}: tensor {name}, made of {', '.join(view.stored)},", tensor)
        return tensor
