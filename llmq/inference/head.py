"""The output head and the embeddings at 8 or 4 bits, rounded to nearest when the model is loaded.

Checkpoints keep both in 16 bits. In a small model the head is a quarter of all bytes that a token
waits for, so decoding gains from fewer of them; the embeddings are looked up, one row per token,
and only their memory counts. 8 bits per row change next to nothing; 4 bits in groups of 32 are the
scheme of llama.cpp's smaller files. What it costs is measured by `llmq eval --head-bits`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.rounding import dequantize
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.module import QuantLinear
from llmq_kernels.core.packing import unpack

HEAD_SPECS = {8: QuantSpec("int8", -1), 4: QuantSpec("int4", 32)}
ROWS_AT_A_TIME = 8192  # of the vocabulary that are float32 at a time: 134 MB at a width of 4096


class QuantEmbedding(nn.Module):
    """Rows of a packed table `[vocabulary, D]`, dequantized when they are looked up. scale_factor:
    what the family multiplies embeddings with, 1 for most."""

    packed: Tensor
    scale: Tensor
    scale_factor: Tensor | None

    def __init__(
        self, qtensor: QuantizedTensor, dtype: torch.dtype, scale_factor: Tensor | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.spec, self.dtype = qtensor.spec, dtype
        self.register_buffer("packed", qtensor.packed)
        self.register_buffer("scale", qtensor.scale)
        self.register_buffer("scale_factor", scale_factor, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids.flatten()
        codes = unpack(self.packed[rows], self.spec.bits, self.embedding_dim)
        values = dequantize(codes, self.scale[rows], None, self.spec).to(self.dtype)
        values = values if self.scale_factor is None else values * self.scale_factor.to(self.dtype)
        return values.view(*input_ids.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise LlmqError(
            f"{prefix.removesuffix('.')}: the head and the embeddings of this model were rounded "
            "for this run, which no format holds; load the folder again to save it"
        )


def quantize_head(model: PreTrainedModel, bits: int | None) -> None:
    """Quantize the output head and the embeddings of `model`, in place; a head that is tied to the
    embeddings gets their codes. None: do nothing. Raises `LlmqError` for other bits than 8 and 4
    and for a model without these parts."""
    if bits is None:
        return
    if bits not in HEAD_SPECS:
        raise LlmqError(f"--head-bits {bits}: expected 8 or 4")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        raise LlmqError(
            f"{type(model).__name__}: its head or its embeddings are not a plain matrix; leave out "
            "--head-bits"
        )
    is_tied = head.weight is embeddings.weight
    table = _quantized(embeddings.weight, HEAD_SPECS[bits])
    rows = table if is_tied else _quantized(head.weight, HEAD_SPECS[bits])
    dtype = head.weight.dtype
    linear = QuantLinear(rows, head.bias, dtype=dtype)
    quantized = next(
        (module for module in model.modules() if isinstance(module, QuantLinear)), None
    )
    linear.set_compute(linear.compute if quantized is None else quantized.compute)
    model.set_output_embeddings(linear)
    model.set_input_embeddings(
        QuantEmbedding(table, dtype, getattr(embeddings, "embed_scale", None))
    )


def _quantized(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Some rows at a time, so that no float32 copy of the whole is made."""
    parts = [
        QuantizedTensor.quantize(rows.detach().float(), spec)
        for rows in weight.split(ROWS_AT_A_TIME)
    ]
    scale = torch.cat([part.scale for part in parts])
    packed = torch.cat([part.packed for part in parts])
    n, k = weight.shape
    return QuantizedTensor(packed, scale, None, parts[0].spec, (n, k))
