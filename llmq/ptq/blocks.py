"""The blocks of a model, one at a time: the model is on the meta device, and a block has its
weights for as long as it is looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.models import compat
from llmq.models.arch import find_blocks, tower_parameters, weight_as_stored
from llmq.models.readers import WeightReader
from llmq.ptq.results import StoredBlock


class Blocks:
    """The blocks of `model` with the weights of `reader`, in float32 on `device`."""

    def __init__(self, model: PreTrainedModel, reader: WeightReader, device: str) -> None:
        self.model, self.reader, self.device = model, reader, device
        self.prefix, self.modules = find_blocks(model)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def n_bytes(self) -> int:
        """Of the first block."""
        return 4 * sum(parameter.numel() for parameter in self.modules[0].parameters())

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def read(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of a block, named as in the block."""
        prefix = self.name(index) + "."
        parameters = [key for key in self.model.state_dict() if key.startswith(prefix)]
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.reader.read_parameters(parameters).items()
        }

    def materialize(self, index: int, stored: dict[str, Tensor]) -> nn.Module:
        """A block with these tensors, named as in the block."""
        block = copy.deepcopy(self.modules[index])
        block.load_state_dict(
            {key: tensor.to(self.device, torch.float32) for key, tensor in stored.items()},
            assign=True,
            strict=False,
        )
        return block.to(self.device)

    def load(self, index: int) -> nn.Module:
        """A block of the source."""
        return self.materialize(index, self.read(index))

    def rebuild(self, index: int, stored: StoredBlock) -> nn.Module:
        """A block made of what was stored alone."""
        prefix = self.name(index) + "."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.kept.items()}
        for layer, tensor in stored.quantized.items():
            weight = tensor.to(self.device).dequantize()
            stored_weight = weight_as_stored(self.model.get_submodule(layer), weight)
            tensors[f"{layer.removeprefix(prefix)}.weight"] = stored_weight.contiguous()
        return self.materialize(index, tensors)

    @contextmanager
    def with_weights_outside(
        self, *, with_head: bool = False, with_towers: bool = False
    ) -> Iterator[None]:
        """Real float32 weights for everything that may run before block 0. The output head does
        not, and may be the largest tensor of all; nor do the towers of a wrapper where there is
        nothing but text. with_head, with_towers: for these, too."""
        head = self.model.get_output_embeddings()
        tied = compat.ties(self.model)
        towers = set() if with_towers else tower_parameters(self.model)
        outside = [
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(self.prefix + ".")
            and name not in tied
            and (with_head or not self._is_of(head, name))
            and name not in towers
        ]
        for name, tensor in self.reader.read_parameters(outside).items():
            set_module_tensor_to_device(self.model, name, self.device, value=tensor.float())
        stored = self._stored_buffers() if with_towers else {}
        for name, buffer in self.model.named_buffers():
            if not name.startswith(self.prefix + "."):
                value = stored.get(name, buffer)
                set_module_tensor_to_device(self.model, name, self.device, value=value)
        of_others = {name: tied[name] for name in tied if with_head and self._is_of(head, name)}
        for name, other in of_others.items():
            value = self.model.get_parameter(other)
            set_module_tensor_to_device(self.model, name, self.device, value=value)
        yield
        for name in (*of_others, *outside):
            set_module_tensor_to_device(self.model, name, "meta")

    def _stored_buffers(self) -> dict[str, Tensor]:
        """Those of towers may be statistics that are no parameters, and nowhere else."""
        parameters = {name for name, _ in self.model.named_parameters()}
        names = [
            name
            for name in self.model.state_dict()
            if name not in parameters and not name.startswith(self.prefix + ".")
        ]
        return self.reader.read_parameters(names)

    def _is_of(self, head: nn.Module | None, name: str) -> bool:
        return head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head
