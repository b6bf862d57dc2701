"""Where weights come from: by the names of a model's parameters, from a folder or from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.models.arch import weight_as_stored
from llmq.models.names import match_names
from llmq.models.shards import ShardReader
from llmq.storage.files import real_path
from llmq.storage.packing import StoredTensor, content_hash, stored_tensors
from llmq.storage.stamps import SourceFiles


class WeightReader(Protocol):
    """Stored copies by model parameter name, in their own dtype."""

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]: ...


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
        return {stored[name]: tensor for name, tensor in self.read_stored(stored).items()}

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names in the source."""
        names = list(names)
        paths = self.shards.paths_of(names)
        try:
            tensors = self.shards.read(names)
        finally:  # a file that is another by now is the reason of whatever went wrong
            if self.source is not None:
                self.source.check(paths)
        if self.source is not None:
            self._read |= {name: _hash(tensor) for name, tensor in tensors.items()}
        return tensors

    def places(self, names: Sequence[str]) -> dict[str, StoredTensor]:
        """Where stored tensors lie, to be copied as they are."""
        found: dict[str, StoredTensor] = {}
        for path in sorted({self.shards.names[name] for name in names}):
            there = stored_tensors(real_path(path))
            found |= {name: there[name] for name in names if self.shards.names[name] == path}
        if self.source is not None:
            self._read |= {name: content_hash(tensor) for name, tensor in found.items()}
        return found

    def take_read(self) -> dict[str, Any]:
        """What was read since the last call: hashes of the tensors, inodes of their files."""
        read, self._read = self._read, {}
        paths = self.shards.paths_of(read)
        return {"inodes": self.source.inodes(paths) if self.source else {}, "tensors": read}

    def is_still(self, before: dict[str, Any]) -> bool:
        """Whether what was read for a finished block is what is there now. Where inodes are the
        same, so are the contents."""
        paths = self.shards.paths_of(before["tensors"])
        if self.source is None or self.source.inodes(paths) == before["inodes"]:
            return True
        return all(  # one at a time: it may be all that lies outside of the blocks
            _hash(self.shards.read([name])[name]) == sha256
            for name, sha256 in before["tensors"].items()
        )

    def stored_name(self, name: str) -> str:
        """The name of a tensor in the source, which other engines know: packed tensors take the
        place of `NAME.weight`."""
        if name in self.names:
            return self.names[name]
        layer, _, suffix = name.rpartition(".")
        return f"{self.names[f'{layer}.weight'].removesuffix('.weight')}.{suffix}"

    def stored_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under their names in the source."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found |= self.shards.as_stored(self.stored_name(name), tensor)
        return found

    def from_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that are stored as they are, out of tensors under their names in the
        source."""
        found = {}
        for name, stored in self.names.items():
            parts = self.shards.parts_of(stored)
            if all(part in tensors for part in parts):
                values = [tensors[part] for part in parts]
                found[name] = values[0] if len(values) == 1 else torch.cat(values)
        return found

    def unused(self) -> list[str]:
        """Stored tensors that belong to no parameter of the model: old buffers, heads for other
        tasks."""
        return sorted(set(self.shards.names) - set(self.names.values()))


class ModelReader:
    """Weights by parameter name from a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.state = model.state_dict()

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.state[name].detach().clone() for name in names if name in self.state}


def weight_reader(model: PreTrainedModel, reader: WeightReader) -> Callable[[str], Tensor]:
    """A function that gives the weight `[N, K]` of a linear layer of `model`, or of its embeddings,
    by its name."""

    def weight_of(name: str) -> Tensor:
        (tensor,) = reader.read_parameters([f"{name}.weight"]).values()
        module = model.get_submodule(name)
        return tensor if isinstance(module, nn.Embedding) else weight_as_stored(module, tensor)

    return weight_of


def _hash(tensor: Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()
