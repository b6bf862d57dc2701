"""Quantize a folder with one of several tools, each on the very same token ids.

    PYTHON scripts/quantize_with.py TOOL MODEL OUT --tokens ids.json --spec w3g64-asym

PYTHON is the interpreter of the environment in which TOOL is installed: llmq, llm-compressor,
autoround or gptqmodel (`scripts/install_peers.sh` makes those of the others, which need nothing of
llmq). ids.json holds a list of rows of equal length. --options are further ones of the tool, as
JSON: fields of llmq's recipe or arguments of `llmq.quantize`, arguments of llm-compressor's
GPTQModifier, of AutoRound, of GPTQModel's QuantizeConfig. Head and embeddings stay as they are,
with every tool.

--usage FILE: what the process took goes there, start and imports included: processor seconds, and
the largest resident memory in megabytes."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """rows: of token ids. group_size: -1 for one scale per row. options: of the tool."""

    model: str
    out: str
    rows: list[list[int]]
    spec: str
    bits: int
    group_size: int
    is_symmetric: bool
    seed: int
    options: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        found = re.fullmatch(r"w(\d)(?:g(\d+))?(-asym)?", args.spec)
        if found is None:
            raise SystemExit(f"--spec {args.spec}: expected such as w4g128 or w3g64-asym")
        bits, group_size, asymmetric = found.groups()
        return cls(
            model=args.model,
            out=args.out,
            rows=json.loads(args.tokens.read_text()),
            spec=args.spec,
            bits=int(bits),
            group_size=int(group_size or -1),
            is_symmetric=asymmetric is None,
            seed=args.seed,
            options=args.options,
        )

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def data_set(self) -> list[dict[str, list[int]]]:
        """A row of ids and of ones, as tokenizers give them."""
        return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in self.rows]


OF_RUN = ("bpw", "max_bytes", "format")  # of llmq.quantize; other options are the recipe's


def run_llmq(request: Request) -> None:
    import torch

    import llmq
    from llmq.recipe import Recipe
    from llmq.text.documents import TokenSet

    of_run = {name: request.options.pop(name) for name in OF_RUN if name in request.options}
    shape = {"samples": len(request.rows), "sequence_length": request.length}
    recipe = Recipe.uniform(request.spec, **shape, seed=request.seed, **request.options)
    # windows that were cut already: none are held out, so that nothing but the method is timed
    tokens = TokenSet(torch.tensor(request.rows), "the benchmark's")
    llmq.quantize(request.model, request.out, recipe, tokens, **of_run)


def run_llm_compressor(request: Request) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {
        "num_bits": request.bits,
        "type": "int",
        "symmetric": request.is_symmetric,
        "strategy": "group" if request.group_size > 0 else "channel",
        "group_size": request.group_size if request.group_size > 0 else None,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"], **request.options)
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    oneshot(
        model=model,
        recipe=modifier,
        dataset=Dataset.from_list(request.data_set()),
        num_calibration_samples=len(request.rows),
        max_seq_length=request.length,
    )
    model.save_pretrained(request.out, save_compressed=True)
    AutoTokenizer.from_pretrained(request.model).save_pretrained(request.out)


def run_autoround(request: Request) -> None:
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request.model)
    rows = torch.tensor(request.rows)
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    loader: Any = DataLoader(examples, batch_size=8, shuffle=False)  # type: ignore[arg-type]
    options = {"iters": 200, "batch_size": 8, "seed": request.seed, **request.options}
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32),
        tokenizer,
        bits=request.bits,
        group_size=request.group_size,
        sym=request.is_symmetric,
        dataset=loader,
        nsamples=len(request.rows),
        seqlen=request.length,
        device_map="cpu",
        **options,
    )
    tuner.quantize_and_save(request.out, format="auto_round")


def run_gptqmodel(request: Request) -> None:
    # It takes half of the processors for its workers and does not start with fewer than two.
    n_processors = max(4, os.cpu_count() or 1)
    os.cpu_count = lambda: n_processors  # type: ignore[method-assign]
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=request.bits,
        group_size=request.group_size,
        sym=request.is_symmetric,
        **request.options,
    )
    model = GPTQModel.load(request.model, config, device="cpu")
    model.quantize(request.data_set(), batch_size=8)
    model.save(request.out)


TOOLS: dict[str, Callable[[Request], None]] = {
    "llmq": run_llmq,
    "llm-compressor": run_llm_compressor,
    "autoround": run_autoround,
    "gptqmodel": run_gptqmodel,
}


def usage() -> dict[str, float]:
    """What this process took until now, and those that it started and waited for."""
    of_all = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in of_all)
    return {"processor_seconds": round(seconds, 1), "peak_megabytes": round(peak_bytes() / 1e6)}


def peak_bytes() -> int:
    """The largest resident memory of this process. Not that of getrusage on Linux, which counts
    what the process that started this one held at that time."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--usage", type=Path)
    args = parser.parse_args(argv)
    TOOLS[args.tool](Request.of(args))
    if args.usage:
        args.usage.write_text(json.dumps(usage()))


if __name__ == "__main__":
    main()
