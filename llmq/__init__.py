"""llmq: quantize Hugging Face causal language models after training or while fine-tuning, with
proof of what was lost.

>>> import llmq
>>> texts = ["def main():\\n    return 0\\n" * 50, "# a text of what the model will see\\n" * 50]
>>> report = llmq.quantize("tiny", "tiny-w4", "W4A16", texts, samples=4, sequence_length=64)
>>> report["format"], report["n_quantized_layers"], report.rows()[0]["spec"]
('compressed-tensors', 28, 'w4g128')

The same in memory, some layers otherwise, by a method that needs no text:

>>> model = llmq.load("tiny")
>>> blocks = llmq.quantize(model, ["w4g128", "*.down_proj=w8"], method="rtn")
>>> folder = llmq.save(model, "tiny-mixed")

What it cost, and what it says:

>>> llmq.perplexity("tiny-mixed", texts, sequence_length=64).value < 100
True
>>> llmq.compare("tiny", "tiny-mixed", texts, sequence_length=64)["top1_agreement"] > 0.8
True
>>> isinstance(llmq.generate("tiny-mixed", "def main():", max_new_tokens=8), str)
True

A model is a folder, a Hub id such as "Qwen/Qwen3-0.6B", a .gguf file, "tiny" (the bundled
one), or in memory.

Importing this package costs nothing: the names below load what they need when they are first used,
and the transformers quantizer that lets `AutoModelForCausalLM.from_pretrained` read llmq folders is
registered when transformers itself is loaded."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from llmq.hooks import when_imported

if TYPE_CHECKING:
    from llmq.api.adapters import merge_adapter
    from llmq.api.exporting import export
    from llmq.api.generation import generate
    from llmq.api.models import load_tokenizer
    from llmq.api.pushing import push
    from llmq.api.quantization import quantize
    from llmq.api.reports import BlockReports, Report
    from llmq.api.scoring import compare, perplexity
    from llmq.api.texts import calibration_windows, evaluation_windows
    from llmq.api.training import prepare_qat, qat_parameter_groups
    from llmq.errors import LlmqError, LlmqWarning, VerificationError
    from llmq.evaluation.perplexity import Perplexity
    from llmq.formats.load import load
    from llmq.formats.save import save
    from llmq.grid.spec import ActSpec, QuantSpec
    from llmq.grid.tensor import QuantizedTensor
    from llmq.inference.decoding import prepare_decoding
    from llmq.qat.callback import QATCallback
    from llmq.qat.weights import freeze
    from llmq.recipe import Recipe, Rule
    from llmq.text.documents import TokenSet, load_documents
    from llmq.text.windows import Windows

__version__ = "0.1.0"

_HOMES = {
    "ActSpec": "llmq.grid.spec",
    "BlockReports": "llmq.api.reports",
    "LlmqError": "llmq.errors",
    "LlmqWarning": "llmq.errors",
    "Perplexity": "llmq.evaluation.perplexity",
    "QATCallback": "llmq.qat.callback",
    "QuantSpec": "llmq.grid.spec",
    "QuantizedTensor": "llmq.grid.tensor",
    "Recipe": "llmq.recipe",
    "Report": "llmq.api.reports",
    "Rule": "llmq.recipe",
    "TokenSet": "llmq.text.documents",
    "VerificationError": "llmq.errors",
    "Windows": "llmq.text.windows",
    "calibration_windows": "llmq.api.texts",
    "compare": "llmq.api.scoring",
    "evaluation_windows": "llmq.api.texts",
    "export": "llmq.api.exporting",
    "freeze": "llmq.qat.weights",
    "generate": "llmq.api.generation",
    "load": "llmq.formats.load",
    "load_documents": "llmq.text.documents",
    "load_tokenizer": "llmq.api.models",
    "merge_adapter": "llmq.api.adapters",
    "perplexity": "llmq.api.scoring",
    "prepare_decoding": "llmq.inference.decoding",
    "prepare_qat": "llmq.api.training",
    "push": "llmq.api.pushing",
    "qat_parameter_groups": "llmq.api.training",
    "quantize": "llmq.api.quantization",
    "save": "llmq.formats.save",
}
__all__ = [
    "ActSpec",
    "BlockReports",
    "LlmqError",
    "LlmqWarning",
    "Perplexity",
    "QATCallback",
    "QuantSpec",
    "QuantizedTensor",
    "Recipe",
    "Report",
    "Rule",
    "TokenSet",
    "VerificationError",
    "Windows",
    "__version__",
    "calibration_windows",
    "compare",
    "evaluation_windows",
    "export",
    "freeze",
    "generate",
    "load",
    "load_documents",
    "load_tokenizer",
    "merge_adapter",
    "perplexity",
    "prepare_decoding",
    "prepare_qat",
    "push",
    "qat_parameter_groups",
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


def __dir__() -> list[str]:
    """What there is to use, for completion."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _register_quantizer() -> None:
    importlib.import_module("llmq.formats.hf_quantizer")


when_imported("transformers.quantizers", _register_quantizer)
