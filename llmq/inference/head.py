"""The output head and the embeddings at 8 or 4 bits, rounded to nearest when the model is loaded.

Most checkpoints keep both in 16 bits (`llmq quantize --embeddings` does not). In a small model the
head is a quarter of all bytes that a token waits for, so decoding gains from fewer of them; the
embeddings are looked up, one row per token, and only their memory counts. 8 bits per row change
next to nothing; 4 bits in groups of 32 are the scheme of llama.cpp's smaller files. What it costs
is measured by `llmq eval --head-bits`."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import quantize_by_rows
from llmq.inference.embedding import quantized_tables, swap_tables
from llmq.models.outside import tables_of

HEAD_SPECS = {8: QuantSpec("int8", -1), 4: QuantSpec("int4", 32)}


def quantize_head(model: PreTrainedModel, bits: int | None) -> None:
    """Quantize the output head and the embeddings of `model`, in place; a head that is tied to the
    embeddings gets their codes. None: do nothing. Raises `LlmqError` for other bits than 8 and 4,
    for a model without these parts and for one that has them quantized."""
    if bits is None:
        return
    if bits not in HEAD_SPECS:
        raise LlmqError(f"--head-bits {bits}: expected 8 or 4")
    if stored := quantized_tables(model):
        name, (_, table) = next(iter(stored.items()))
        raise LlmqError(
            f"--head-bits {bits}: {name} is stored quantized ({table.spec}); leave out --head-bits"
        )
    tables = {
        table.role: quantize_by_rows(model.get_submodule(table.name).weight, HEAD_SPECS[bits])
        for table in tables_of(model)
    }
    swap_tables(model, tables)
    model.get_input_embeddings().is_for_run = True
