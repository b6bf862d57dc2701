"""Code to paste into a terminal or a program, for the engines that read a result.

Which do is no matter of this module: `llmq.formats.engines` says it of every result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPT = "The capital of France is"
_TRANSFORMERS = """\
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
# By engine: the language of the code, and the code. {name} is a text in quotes.
_CODE = {
    "llmq": (
        "python",
        """\
import llmq

model = llmq.load({name})
print(llmq.generate(model, "{prompt}", max_new_tokens=32))""",
    ),
    "transformers": ("python", _TRANSFORMERS),
    "transformers + compressed-tensors": ("python", _TRANSFORMERS),
    "transformers + gptqmodel": ("python", _TRANSFORMERS),
    "vLLM": ("bash", "vllm serve {name}"),
    "vLLM on a CPU": ("bash", "vllm serve {name}"),
    "SGLang": ("bash", "python -m sglang.launch_server --model-path {name}"),
    "GPTQModel": (
        "python",
        """\
from gptqmodel import GPTQModel

model = GPTQModel.load({name})
print(model.tokenizer.decode(model.generate("{prompt}")[0]))""",
    ),
    "mlx-lm": (
        "python",
        """\
from mlx_lm import generate, load

model, tokenizer = load({name})
print(generate(model, tokenizer, prompt="{prompt}", max_tokens=32))""",
    ),
    "llama.cpp": ("bash", 'llama-cli -m {name} -p "{prompt}" -n 32'),
}
_IMAGES = "image-text-to-text"


@dataclass(frozen=True)
class Usage:
    """Code for engines that take the same. title: their names, with the versions that were looked
    at. language: "python" or "bash"."""

    engines: tuple[str, ...]
    title: str
    language: str
    code: str


def usages(
    engines: Iterable[Mapping[str, Any]], name: str, pipeline: str | None = None
) -> list[Usage]:
    """Code for exactly the engines that read a result. engines: as `Reading.to_json` gives them.
    name: of the folder or file, or its id on the Hub. pipeline: what the model is for, as the Hub
    calls it."""
    by_code: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for engine in engines:
        if engine["reads"]:
            language, template = _CODE[engine["engine"]]
            code = template.format(
                name=quoted(name), prompt=PROMPT, auto_class=_auto_class(pipeline)
            )
            by_code.setdefault((language, code), []).append(engine)
    return [
        Usage(tuple(each["engine"] for each in same), _title(same), language, code)
        for (language, code), same in by_code.items()
    ]


def quoted(name: str) -> str:
    """A name as a text of Python and of a shell."""
    return json.dumps(name, ensure_ascii=False)


def _auto_class(pipeline: str | None) -> str:
    return "AutoModelForImageTextToText" if pipeline == _IMAGES else "AutoModelForCausalLM"


def _title(engines: list[Mapping[str, Any]]) -> str:
    """Names, with the versions that were looked at: of an engine and of a package beside it."""
    titles = []
    for engine in engines:
        names, versions = (engine[key].split(" + ") for key in ("engine", "version"))
        parts = zip(names, versions, strict=True)
        titles.append(" with ".join(name if name == "llmq" else f"{name} {v}" for name, v in parts))
    return ", ".join(titles)
