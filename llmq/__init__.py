"""llmq: quantize Hugging Face causal language models after training or while fine-tuning, with
proof of what was lost.

    import llmq
    llmq.quantize(model, llmq.Recipe.uniform("w4g128"), tokens)
    llmq.save(model, "out", tokenizer=tokenizer)
    model = llmq.load("out")

Importing this package costs nothing: the names below load what they need when they are first used,
and the transformers quantizer that lets `AutoModelForCausalLM.from_pretrained` read llmq folders is
registered when transformers itself is loaded."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from llmq.hooks import when_imported

if TYPE_CHECKING:
    from llmq.errors import LlmqError, VerificationError
    from llmq.evaluation.divergence import compare
    from llmq.evaluation.perplexity import perplexity
    from llmq.formats.load import load
    from llmq.formats.save import save
    from llmq.grid.spec import QuantSpec
    from llmq.grid.tensor import QuantizedTensor
    from llmq.ptq.in_memory import quantize
    from llmq.qat.prepare import prepare_qat
    from llmq.qat.weights import freeze
    from llmq.recipe import Recipe, Rule

__version__ = "0.1.0"

_HOMES = {
    "LlmqError": "llmq.errors",
    "VerificationError": "llmq.errors",
    "QuantSpec": "llmq.grid.spec",
    "QuantizedTensor": "llmq.grid.tensor",
    "Recipe": "llmq.recipe",
    "Rule": "llmq.recipe",
    "compare": "llmq.evaluation.divergence",
    "freeze": "llmq.qat.weights",
    "load": "llmq.formats.load",
    "perplexity": "llmq.evaluation.perplexity",
    "prepare_qat": "llmq.qat.prepare",
    "quantize": "llmq.ptq.in_memory",
    "save": "llmq.formats.save",
}
__all__ = [
    "LlmqError",
    "QuantSpec",
    "QuantizedTensor",
    "Recipe",
    "Rule",
    "VerificationError",
    "__version__",
    "compare",
    "freeze",
    "load",
    "perplexity",
    "prepare_qat",
    "quantize",
    "save",
]


# Threads that import modules of one circle from different ends get half-made ones.
_IMPORTING = threading.RLock()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    with _IMPORTING:
        return getattr(importlib.import_module(_HOMES[name]), name)


def _register_quantizer() -> None:
    importlib.import_module("llmq.formats.hf_quantizer")


when_imported("transformers.quantizers", _register_quantizer)
