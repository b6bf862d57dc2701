"""The matrices with a row for each token of the vocabulary, which lie outside of the blocks: the
embeddings and the output head, or the one tensor that is both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat

EMBEDDINGS, HEAD, TIED = "embeddings", "head", "embeddings and head"


@dataclass(frozen=True)
class Table:
    """role: "embeddings", "head", or "embeddings and head" for a tensor that is both. name: of the
    module whose weight it is. shape: `(vocabulary, D)`."""

    role: str
    name: str
    shape: tuple[int, int]


def tables_of(model: PreTrainedModel) -> list[Table]:
    """What a full-precision model has, tied weights once, under the name that they are stored by.
    Raises `LlmqError` for embeddings or a head that are no plain matrix."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if not is_plain(embeddings) or not isinstance(head, nn.Linear):
        parts = " and ".join(type(part).__name__ for part in (embeddings, head))
        raise LlmqError(
            f"{type(model).__name__}: its embeddings and its head ({parts}) are not both plain "
            "matrices, and nothing else can be quantized; leave out --embeddings and --head"
        )
    first, second = names[id(embeddings)], names[id(head)]
    shapes = [(len(part.weight), part.weight.shape[1]) for part in (embeddings, head)]
    if is_tied(model):
        is_other = f"{first}.weight" in compat.ties(model)
        return [Table(TIED, second if is_other else first, shapes[0])]
    return [Table(EMBEDDINGS, first, shapes[0]), Table(HEAD, second, shapes[1])]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embeddings of a full-precision model are one tensor: in memory, or, on the
    meta device, as the model is configured."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "weight", None) is getattr(embeddings, "weight", head):
        return True
    names = {id(module): name for name, module in model.named_modules()}
    pair = {f"{names[id(module)]}.weight" for module in (embeddings, head)}
    is_meta = head.weight.is_meta
    return is_meta and any(
        {target, source} == pair for target, source in compat.ties(model).items()
    )


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module looks rows of its weight up and does no more than multiply them with one
    number."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module) is nn.Embedding or hasattr(module, "embed_scale")
