"""Quantized embeddings and output heads in a folder: where their tensors go while transformers
loads them, and what becomes of these."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.grid.spec import ActSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.embedding import QuantEmbedding, put, traits
from llmq.inference.module import QuantLinear
from llmq.models import compat


def reserve_tie(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Before weights are loaded, and with places for all stored layers: where embeddings and head
    are one tensor and it is stored quantized, for one of the two, make a place without tensors for
    the other. transformers ties nothing then. stored: names of tensors, as in the model. A config
    that says tied, of a model whose head and embeddings are both stored, does so no more."""
    from llmq.formats.hf_quantizer import StoredLinear

    pair = model.get_input_embeddings(), model.get_output_embeddings()
    places = [module for module in pair if isinstance(module, StoredLinear)]
    if not places:
        return
    by_id = {id(module): name for name, module in model.named_modules()}
    names = [by_id[id(module)] for module in pair if module is not None]
    weights = {f"{name}.weight" for name in names}
    was_tied = any({*tie} == weights for tie in compat.ties(model).items())
    compat.forget_ties(model, weights)
    if not was_tied:
        return
    if len(places) == len(pair) or weights & set(stored):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        return
    (other,) = (module for module in pair if module is not places[0])
    bias = getattr(other, "bias", None)
    headers = {"bias": (bias.dtype, tuple(bias.shape))} if isinstance(bias, Tensor) else {}
    embeddings = other if other is pair[0] else None
    put(model, other, StoredLinear(headers, places[0].shape, embeddings))


def put_tables(model: PreTrainedModel, tables: dict[str, QuantizedTensor]) -> None:
    """After weights are loaded, put embeddings and head where places were made for them. tables: by
    name of the module that they are stored as. Inputs of such a head are not quantized."""
    from llmq.formats.hf_quantizer import StoredLinear

    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = tables.get(names[id(embeddings)])
    if isinstance(head, StoredLinear):
        rows = tables.get(names[id(head)], table)
        assert rows is not None
        linear = QuantLinear(rows, head.tensors().get("bias"), ActSpec(), model.dtype)
        put(model, head, linear)
        table = None if rows is table else table
        head = linear
    if isinstance(embeddings, StoredLinear):
        old = embeddings.replaced[0]
        found = head if table is None else table
        assert isinstance(found, QuantizedTensor | QuantLinear)
        put(model, embeddings, QuantEmbedding(found, old.weight.dtype, **traits(old)))


def is_table(model: PreTrainedModel, module: nn.Module, *, head: bool) -> bool:
    """Whether a module is where the embeddings are, or the head."""
    if module is model.get_input_embeddings():
        return True
    return head and module is model.get_output_embeddings()
