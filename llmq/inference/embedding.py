"""Embeddings in storage form: rows are looked up packed, and only these are dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.rounding import dequantize
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear, quantized_modules
from llmq.models import compat
from llmq.models.outside import EMBEDDINGS, HEAD, TIED
from llmq_kernels.core.packing import unpack


class QuantEmbedding(nn.Module):
    """Rows of a packed table `[vocabulary, D]`, dequantized in float32 when they are looked up.

    dtype: of what is looked up; it follows `.to(dtype)`, the scales do not. padding_idx: as
    `nn.Embedding` has it. embed_scale: what the family multiplies embeddings with, a number or a
    tensor that is cast to dtype, or None. Where the table is the output head, too, that holds the
    one copy of it, and is given as the table. is_for_run: rounded when it was loaded, so
    that no folder is to be written of it."""

    packed: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    embed_scale: Tensor | float | None
    like: Tensor

    def __init__(
        self,
        table: QuantizedTensor | QuantLinear,
        dtype: torch.dtype,
        *,
        padding_idx: int | None = None,
        embed_scale: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, or it would be a part of this module, and its buffers, too.
        self._head = (table,) if isinstance(table, QuantLinear) else ()
        qtensor = table.qtensor() if isinstance(table, QuantLinear) else table
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.spec: QuantSpec = qtensor.spec
        self.padding_idx = padding_idx
        self.is_for_run = False
        for name in ("packed", "scale", "zero"):
            self.register_buffer(name, None if self._head else getattr(qtensor, name))
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale
        device = qtensor.scale.device
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        for head in self._head:
            head.is_shared = True

    @property
    def dtype(self) -> torch.dtype:
        """Of what is looked up."""
        return self.like.dtype

    @property
    def is_tied(self) -> bool:
        """Whether the output head holds the table."""
        return bool(self._head)

    def qtensor(self) -> QuantizedTensor:
        """The table in canonical form."""
        for head in self._head:
            return head.qtensor()
        assert self.packed is not None
        assert self.scale is not None
        shape = (self.num_embeddings, self.embedding_dim)
        return QuantizedTensor(self.packed, self.scale, self.zero, self.spec, shape)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids.flatten()
        if self._head:
            head = self._head[0]
            packed, scale, zero = head.packed_rows(rows), head.scale, head.zero
        else:
            assert self.packed is not None
            assert self.scale is not None
            packed, scale, zero = self.packed[rows], self.scale, self.zero
        codes = unpack(packed, self.spec.bits, self.embedding_dim)
        zero = None if zero is None else zero[rows]
        values = dequantize(codes, scale[rows], zero, self.spec).to(self.dtype)
        values = self._scaled(values)
        return values.view(*input_ids.shape, self.embedding_dim)

    def _scaled(self, values: Tensor) -> Tensor:
        """As Gemma and others multiply what they look up."""
        if self.embed_scale is None:
            return values
        factor = self.embed_scale
        return values * (factor.to(self.dtype) if isinstance(factor, Tensor) else factor)

    def _apply(self, fn: object, recurse: bool = True) -> QuantEmbedding:
        before = self.scale
        super()._apply(fn, recurse)
        if before is not None and self.scale is not None and before.dtype != self.scale.dtype:
            self.scale = before.to(self.scale.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_for_run:
            raise LlmqError(
                f"{prefix.removesuffix('.')}: the head and the embeddings of this model were "
                "rounded for this run (head bits); load the folder again to save it, or quantize "
                "the original model with --embeddings"
            )
        if not self._head:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        table = self.qtensor()
        for name in ("packed", "scale", "zero"):
            if (tensor := getattr(table, name)) is not None:
                destination[f"{prefix}{name}"] = tensor

    def extra_repr(self) -> str:
        tied = ", tied to the head" if self.is_tied else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, spec={self.spec}{tied}"


def swap_tables(model: PreTrainedModel, tables: Mapping[str, QuantizedTensor]) -> None:
    """Put quantized tables in the place of the embeddings and the output head of a full-precision
    model, in place. tables: by role, see `llmq.models.outside.Table`."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    dtype = embeddings.weight.dtype
    linear: QuantLinear | None = None
    if (rows := tables.get(TIED, tables.get(HEAD))) is not None:
        linear = QuantLinear(rows, head.bias, dtype=dtype)
        linear.set_compute(_compute_of(model, linear.compute))
    looked_up = linear if TIED in tables else tables.get(EMBEDDINGS)
    if looked_up is not None:
        put(model, embeddings, QuantEmbedding(looked_up, dtype, **traits(embeddings)))
    if linear is not None:
        put(model, head, linear)


def put(model: PreTrainedModel, old: nn.Module, new: nn.Module) -> None:
    """Replace embeddings or head of a model. transformers ties their weights no more."""
    name = next(name for name, module in model.named_modules() if module is old)
    compat.forget_ties(model, [f"{name}.weight"])
    model.set_submodule(name, new)


def traits(embeddings: nn.Module) -> dict[str, Any]:
    """What sets embeddings apart beside their table. Raises `LlmqError` where it is not known."""
    factor = getattr(embeddings, "embed_scale", None)
    if isinstance(factor, Tensor) and factor.is_meta:
        number = getattr(embeddings, "scalar_embed_scale", None)
        if number is None:
            raise LlmqError(
                f"{type(embeddings).__name__}: what it multiplies embeddings with is not known; "
                "this architecture is not supported with quantized embeddings"
            )
        factor = torch.tensor(number, dtype=factor.dtype)
    return {"padding_idx": getattr(embeddings, "padding_idx", None), "embed_scale": factor}


def _compute_of(model: PreTrainedModel, default: str) -> str:
    """How the layers of a model compute that are quantized already."""
    return next((module.compute for module in quantized_modules(model).values()), default)


def quantized_tables(model: PreTrainedModel) -> dict[str, tuple[str, QuantizedTensor]]:
    """Name of module -> role and table, of embeddings and head that are quantized; what is both
    once, under the name of the embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, tuple[str, QuantizedTensor]] = {}
    for name, module in model.named_modules():
        if module is embeddings and isinstance(module, QuantEmbedding):
            found[name] = (TIED if module.is_tied else EMBEDDINGS, module.qtensor())
        elif module is head and isinstance(module, QuantLinear) and not module.is_shared:
            found[name] = (HEAD, module.qtensor())
    return found
