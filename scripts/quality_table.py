"""Perplexity of RTN, GPTQ and block-wise tuning at several bit widths, over calibration seeds, as a
table: the project's own check of quality.

    python scripts/quality_table.py tiny python scripts/quality_table.py MODEL --calibration
    calibration.txt --eval eval.txt --seeds 3 --sequence-length 256

Float32 arithmetic on the dequantized weights, protocol `gptq`, lm_head and embeddings in full
precision. Also checks that GPTQ beats RTN in every layer's Hessian-weighted error at 4 bits and
fewer, and exits with 1 when it does not, or when a method's mean perplexity is not below that of
the one to its left."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import llmq
from llmq.evaluation.perplexity import Perplexity, evaluate
from llmq.inference.module import quantized_modules
from llmq.models.source import load_config, load_tokenizer, resolve
from llmq.ptq.job import windows
from llmq.ptq.methods import needs_text
from llmq.recipe import Recipe
from llmq.text.documents import load_documents
from llmq.text.windows import Windows, cut_windows

METHODS = ("gptq", "blockwise")
SPECS = ("w8", "w4g128", "w4g64", "w3g128", "w3g64-asym", "w2g64-asym")


def dequantized(model: Any) -> Any:
    """The model with plain float32 linear layers in place of the packed ones: the same values,
    without unpacking at every step."""
    for name, module in quantized_modules(model).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight.data = module.qtensor().dequantize()
        if module.bias is not None:
            plain.bias.data = module.bias.float()
        model.set_submodule(name, plain)
    return model


def measure(
    model_name: str, recipe: Recipe, calibration: str, text: Windows
) -> tuple[Perplexity, float, list[Any]]:
    """Perplexity, seconds of the quantization, and the report of every layer."""
    model = llmq.load(model_name)
    model_dir = resolve(model_name)
    tokens = (
        windows(load_tokenizer(model_dir), load_config(model_dir), recipe, calibration).tokens
        if needs_text(recipe)
        else None
    )
    started = time.perf_counter()
    blocks = llmq.quantize(model, recipe, tokens)
    seconds = time.perf_counter() - started
    return (
        evaluate(dequantized(model).float(), text),
        seconds,
        [layer for block in blocks for layer in block.layers],
    )


@dataclass(frozen=True)
class Column:
    """One method at one spec: perplexity per seed, the fastest run's seconds, and the largest ratio
    of a layer's error to that of plain rounding. Block-wise tuning may exceed 1 there: it aims at
    the block's output, not at the layer's."""

    method: str
    values: list[float]
    seconds: float
    worst_layer: float

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} | {', '.join(f'{value:.3f}' for value in self.values)} | "
            f"{self.seconds:.1f} | {self.worst_layer:.2f}"
        )


def measure_seeds(args: argparse.Namespace, method: str, spec: str, text: Windows) -> Column:
    values, times, ratios = [], [], []
    for seed in range(args.seeds):
        recipe = Recipe.uniform(
            spec,
            **{
                "method": method,
                "samples": args.samples,
                "sequence_length": args.sequence_length,
                "seed": seed,
                **args.options,
            },
        )
        result, seconds, layers = measure(args.model, recipe, args.calibration, text)
        values.append(result.value)
        times.append(seconds)
        ratios += [layer.error / layer.rtn_error for layer in layers]
    return Column(method, values, min(times), max(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", default="bundled")
    parser.add_argument("--eval", default="bundled")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument(
        "--options", type=json.loads, default={}, help="further fields of the recipe, as JSON"
    )
    args = parser.parse_args()

    model_dir = resolve(args.model)
    text = cut_windows(
        load_documents(args.eval, "eval"),
        load_tokenizer(model_dir),
        load_config(model_dir),
        args.sequence_length,
    )
    text = replace(text, tokens=text.tokens[: args.max_windows])
    full = evaluate(llmq.load(args.model, dtype="float32"), text)
    print(
        f"full precision: {full.value:.3f} ({full.ci95[0]:.3f} to {full.ci95[1]:.3f}); "
        f"{text.n_targets} tokens\n",
        flush=True,
    )
    titles = [
        f"{method}, mean | each seed | seconds | worst layer, error / RTN error"
        for method in args.methods
    ]
    print(
        f"| weights | RTN | {' | '.join(titles)} |\n|---|---|{'---|---|---|---|' * len(titles)}",
        flush=True,
    )
    failures = []
    for spec in args.specs:
        rounded, _, _ = measure(
            args.model, Recipe.uniform(spec, method="rtn"), args.calibration, text
        )
        columns = [measure_seeds(args, method, spec, text) for method in args.methods]
        print(f"| {spec} | {rounded.value:.3f} | {' | '.join(map(str, columns))} |", flush=True)
        means = [rounded.value, *(column.mean for column in columns)]
        worst_gptq = max(
            (column.worst_layer for column in columns if column.method == "gptq"), default=0.0
        )
        if not spec.startswith("w8") and (means != sorted(means, reverse=True) or worst_gptq >= 1):
            failures.append(spec)
    sys.exit(f"not better from left to right at {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
