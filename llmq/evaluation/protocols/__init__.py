"""The protocols of a perplexity by name. A protocol is one file with a `PROTOCOL`, which says how
tokens are cut, which predictions count, and what the figure is per, and one line here.

Nothing heavy is imported: the command line reads this for `--help`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmq.errors import LlmqError
from llmq.messages import did_you_mean

if TYPE_CHECKING:
    from llmq.evaluation.protocols.base import Protocol

PROTOCOLS = {
    "gptq": "disjoint windows, all but the first token of each scored, as papers on quantization "
    "do it",
    "strided": "windows that overlap, each token scored once, as in the guide of transformers",
    "llamacpp": "disjoint windows of 512, the second half of each scored, as llama-perplexity does "
    "it",
    "words": "document by document, per word, as lm-eval does it for WikiText",
}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name. Raises `LlmqError` with the names that exist."""
    if name not in PROTOCOLS:
        *names, last = PROTOCOLS
        raise LlmqError(
            f"protocol {name!r}: expected {', '.join(names)} or {last}"
            f"{did_you_mean(str(name), PROTOCOLS)}"
        )
    protocol: Protocol = import_module(f"{__name__}.{name}").PROTOCOL
    return protocol
