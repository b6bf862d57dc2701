"""A model as GGUF, proved by its readers: the gguf package, transformers, and llama.cpp.

    python scripts/check_gguf.py MODEL FILE.gguf     # writes the file where it is not there
    python scripts/check_gguf.py tiny-w4 /tmp/tiny-w4.gguf --json

MODEL: what the file is exported from. Compared are the values of every packed layer, the tokens of
some texts, float32 logits (transformers) and log-probabilities (llama.cpp, whose kernels round
activations to 8 bits for packed layers). A reader that is not installed is named and left out:
pip install gguf llama-cpp-python."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmq
from llmq.formats.gguf.export import export_gguf
from llmq.inference.module import quantized_modules
from llmq.models.source import Source

TEXTS = (
    "The capital of France is Paris. In 1889 the Eiffel Tower was built there; it is 330 m high.",
    "def f(x):\n    return x + 12345  # don't  ask\n\n\n\tfor i in range(10):\n\t\tprint(f'{i}')\n",
    "\u00dcber \u65e5\u672c\u8a9e und \U0001f600: na\u00efve caf\u00e9s, \u043f\u0440\u0438!",
    "  two spaces,   three, and\u00a0a hard one; I'll, we'VE, it's 3.14159 or 1,000,000.",
)


def dequantized(source: Source) -> PreTrainedModel:
    """The model in float32, its packed layers multiplied out."""
    model = llmq.load(source, dtype="float32")
    for name, module in quantized_modules(model).items():
        weight = module.qtensor().dequantize()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        layer.weight.data = weight
        if module.bias is not None:
            layer.bias.data = module.bias.data.float()
        model.set_submodule(name, layer)
    return model


def logits_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """float32 `[T, vocabulary]`."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def check_package(path: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    """Whether the gguf package reads the values of every tensor that it knows the type of.
    expected: what is in the file, by name in it, in no matter which order of rows."""
    import gguf

    reader = gguf.GGUFReader(path)
    differ = []
    for tensor in reader.tensors:
        if tensor.name in expected:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
            found = torch.from_numpy(values.copy()).sort().values
            if not torch.equal(found, expected[tensor.name].reshape(-1).sort().values):
                differ.append(tensor.name)
    return {"tensors": len(reader.tensors), "compared": len(expected), "differ": differ}


def check_transformers(path: Path, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Tokens and float32 logits of transformers' `gguf_file=`."""
    names = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read_tokenizer = AutoTokenizer.from_pretrained(**names)
    read = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    worst = max(float((logits_of(model, t) - logits_of(read, t)).abs().max()) for t in ids)
    tokens = [read_tokenizer(text)["input_ids"] for text in TEXTS]
    return {"same_tokens": same(ids, tokens), "max_logit_difference": worst}


def check_llama_cpp(path: Path, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of llama.cpp."""
    from llama_cpp import Llama, llama_print_system_info

    reader = Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = [reader.tokenize(text.encode(), add_bos=True, special=False) for text in TEXTS]
    worst, total, n = 0.0, 0.0, 0
    for text_ids in ids:
        reader.reset()
        reader.eval(text_ids)
        theirs = torch.tensor(reader.scores[: len(text_ids)]).float().log_softmax(-1)[:-1]
        ours = logits_of(model, text_ids).log_softmax(-1)[:-1]
        following = torch.tensor(text_ids[1:])[:, None]
        difference = (theirs - ours).gather(1, following).abs()
        worst, total = max(worst, float(difference.max())), total + float(difference.sum())
        n += len(difference)
    return {
        "same_tokens": same(ids, tokens),
        "max_logprob_difference": worst,
        "mean_logprob_difference": total / n,
        "system": llama_print_system_info().decode().strip(),
    }


def same(ours: list[list[int]], theirs: list[list[int]]) -> list[bool]:
    """Text by text."""
    return [first == second for first, second in zip(ours, theirs, strict=True)]


def packed_values(source: Source, model: PreTrainedModel) -> dict[str, Tensor]:
    """What the file holds of every layer that is packed in the source, by name in the file."""
    from llmq.formats.gguf.families import family_of_model
    from llmq.formats.layers import StoredLayers

    family = family_of_model(source.config.get_text_config().model_type)
    state = model.state_dict()
    names = [f"{layer}.weight" for layer in StoredLayers.of(source).packed]
    return {family.gguf_name(name): state[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("path", type=Path)
    parser.add_argument("--allow-requantize", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source = Source.open(args.model)
    result: dict[str, Any] = {"model": args.model, "file": str(args.path)}
    if not args.path.exists():
        report = export_gguf(source, args.path, allow_requantize=args.allow_requantize)
        result["export"] = report.to_json()
    model = dequantized(source)
    checks = {
        "gguf": ("gguf", lambda: check_package(args.path, packed_values(source, model))),
        "transformers": ("gguf", lambda: check_transformers(args.path, model, source.tokenizer)),
        "llama.cpp": ("llama_cpp", lambda: check_llama_cpp(args.path, model, source.tokenizer)),
    }
    for name, (package, check) in checks.items():
        if find_spec(package) is None:
            result[name] = f"not checked: {package} is not installed"
            continue
        try:
            result[name] = check()
        except Exception as error:  # what a reader refuses is a result
            result[name] = f"refused: {type(error).__name__}: {str(error)[:200]}"
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
