"""Whether two commits write the same bytes: for changes that only move code.

    python scripts/compare_commits.py BASE [HEAD] [--only PATTERN]

Both commits are checked out beside each other and run the same matrix on this machine: families,
methods, formats, activations, a run that is killed and resumed, and a fine-tuning run, on tiny
random models. Then every tensor is compared bit for bit, and configs and reports without what a
second run of the same commit changes, too (times, versions, paths). Exit code 1 names each
difference. There are no stored hashes: other machines and versions round otherwise.

Known differences of a commit that adds something to reports can be left out by key: --ignore KEY.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
TEXT = ["--calibration", "TEXT", "--samples", "8", "--sequence-length", "32"]
GPTQ = ["--bits", "4", "--group-size", "32", *TEXT]
METHODS = {
    "rtn": ["--method", "rtn", "--bits", "4", "--group-size", "32"],
    "gptq": GPTQ,
    "blockwise": [*GPTQ, "--method", "blockwise", "--iterations", "3"],
}
FORMATS = {
    "gptq_v2": [*GPTQ, "--asymmetric", "--format", "gptq_v2"],
    "act-order": [*GPTQ, "--act-order", "--format", "gptq"],
    "w3": ["--bits", "3", "--group-size", "64", "--asymmetric", *TEXT],
    "w8a8": ["--bits", "8", "--activations", "int8-token", *TEXT],
    "w8a8-static": ["--bits", "8", "--activations", "int8-static", "--kv-bits", "8", *TEXT],
    "ternary": ["--bits", "ternary", "--group-size", "32", *TEXT],
    "bitnet": ["--bits", "ternary", "--group-size", "0", "--activations", "int8-token", *TEXT],
    "rules": [*GPTQ, "--rule", "*.layers.0.*=keep", "--rule", "*.down_proj=w8"],
}
QAT = ["--train", "TEXT", "--max-steps", "3", "--batch-size", "2", "--sequence-length", "32"]
# What two runs of one commit differ in.
UNSTABLE = {"seconds", "seconds_per_block", "versions", "meta", "_name_or_path", "model", "out"}


@dataclass(frozen=True)
class Case:
    """name: of the output folder. command: arguments of llmq, with MODEL and OUT to be filled in.
    is_killed: the run is killed after its first block, and given again."""

    name: str
    family: str
    command: list[str]
    is_killed: bool = False


def matrix() -> Iterator[Case]:
    """Every case."""
    for family in FAMILIES:
        for method, options in METHODS.items():
            yield Case(f"{family}-{method}", family, ["quantize", "MODEL", "OUT", *options])
        scheme = ["--scheme", "w4", "--group-size", "32", *QAT]
        yield Case(f"{family}-qat", family, ["qat", "MODEL", "OUT", *scheme])
    for name, options in FORMATS.items():
        yield Case(f"llama-{name}", "llama", ["quantize", "MODEL", "OUT", *options])
    yield Case("llama-resumed", "llama", ["quantize", "MODEL", "OUT", *GPTQ], is_killed=True)


def make_inputs(folder: Path) -> None:
    """A random model of each family with the bundled tokenizer, and a text."""
    for family, own in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **own}))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.08)
        model.save_pretrained(folder / family)
        for path in (ROOT / "llmq" / "assets" / "tiny").glob("tokenizer*"):
            shutil.copy(path, folder / family)
    rows = (f"def f{i}(a, b={i}):\n    return a + b * {i * i}\n" for i in range(400))
    (folder / "text.txt").write_text("\n".join(rows))


def run(checkout: Path, case: Case, inputs: Path, out_dir: Path) -> str | None:
    """Run a case with the code of a checkout. Returns what went wrong, or None."""
    places = {"MODEL": inputs / case.family, "OUT": out_dir, "TEXT": inputs / "text.txt"}
    command = [str(places.get(word, word)) for word in case.command]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}",
        "HF_HUB_OFFLINE": "1",
    }
    argv = [sys.executable, "-m", "llmq", *command]
    if case.is_killed:
        _kill_after_first_block(argv, environment, checkout, out_dir)
    done = subprocess.run(argv, env=environment, cwd=checkout, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _kill_after_first_block(
    argv: list[str], environment: dict[str, str], checkout: Path, out_dir: Path
) -> None:
    process = subprocess.Popen(argv, env=environment, cwd=checkout, stderr=subprocess.DEVNULL)
    work_dirs = f".{out_dir.name}.*"
    while process.poll() is None:
        first = out_dir.parent.glob(f"{work_dirs}/*/00000.safetensors")
        earlier = out_dir.parent.glob(f"{work_dirs}/checkpoint/model-00001*.safetensors")
        if any(first) or any(earlier):  # as older commits call it
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.01)


def differences(base: Path, head: Path, ignored: set[str]) -> list[str]:
    """What differs between two output folders."""
    found = []
    before, after = _tensors(base), _tensors(head)
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after:
            found.append(f"tensor {key} is in one only")
        elif before[key].dtype != after[key].dtype or not _same_bits(before[key], after[key]):
            found.append(f"tensor {key} differs")
    for name in ("config.json", "quantize_config.json", "report.json"):
        paths = [folder / name for folder in (base, head)]
        there, here = (json.loads(p.read_text()) if p.is_file() else None for p in paths)
        found += [f"{name}: {line}" for line in _json_differences(there, here, ignored)]
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that is stored, in whatever files it lies."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _json_differences(there: Any, here: Any, ignored: set[str], at: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted((there.keys() | here.keys()) - ignored)
        parts = (_json_differences(there.get(k), here.get(k), ignored, f"{at}.{k}") for k in keys)
        return [line for part in parts for line in part]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        parts = (_json_differences(a, b, ignored, f"{at}[{i}]") for i, (a, b) in pairs)
        return [line for part in parts for line in part]
    return [] if there == here else [f"{at}: {str(there)[:60]} -> {str(here)[:60]}"]


def checkout_of(commit: str, folder: Path) -> Path:
    """A copy of the tree at a commit."""
    folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--only", default="*", help="pattern of the cases to run")
    parser.add_argument("--ignore", action="append", default=[], help="key of a config or report")
    args = parser.parse_args()
    ignored = UNSTABLE | set(args.ignore)
    n_different = 0
    with tempfile.TemporaryDirectory(prefix="llmq-commits-") as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        checkouts = {
            side: checkout_of(commit, folder / side / "code")
            for side, commit in (("base", args.base), ("head", args.head))
        }
        for case in matrix():
            if not fnmatch.fnmatch(case.name, args.only):
                continue
            outs = {side: folder / side / case.name for side in checkouts}
            faults = {
                side: run(checkout, case, folder / "inputs", outs[side])
                for side, checkout in checkouts.items()
            }
            if any(faults.values()):
                lines = [f"{side} fails: {fault}" for side, fault in faults.items() if fault]
            else:
                lines = differences(outs["base"], outs["head"], ignored)
            n_different += bool(lines)
            print(f"{'DIFFERS' if lines else 'equal  '} {case.name}", flush=True)
            for line in lines[:12]:
                print(f"        {line}")
    return int(n_different > 0)


if __name__ == "__main__":
    sys.exit(main())
