"""The runs of `quality_table.py`: what decides one, running it, and measuring what it wrote."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import llmq
from llmq.evaluation.divergence import compare_tokens, summarize
from llmq.inference.module import quantized_modules
from llmq.models.arch import needs_bos
from llmq.models.source import load_config, load_tokenizer
from llmq.ptq.methods import METHODS, needs_text
from llmq.recipe import Recipe
from llmq.text.documents import load_documents
from llmq.text.windows import Bos, Windows, cut_windows

QUANTIZE = Path(__file__).resolve().with_name("quantize_with.py")
# Raised when figures change their meaning, or when other tools are called in another way, so that
# lines of before are not taken.
MEASURE = 1
LLMQ_PACKAGES = ("torch", "transformers")  # its own version is that of the code
PEER_PACKAGES = {
    "llm-compressor": ("llmcompressor", "compressed-tensors", "torch", "transformers"),
    "autoround": ("auto-round", "torch", "transformers"),
    "gptqmodel": ("gptqmodel", "torch", "transformers"),
}
# What AutoRound's own commands auto-round-light, auto-round and auto-round-best set, but for the
# amount of text, which is the same for all here (auto-round-best takes four times as much).
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "autoround": {
        "light": {"iters": 50, "lr": 5e-3},
        "default": {"iters": 200},
        "best": {"iters": 1000},
    }
}
# What decides the codes, scales and zero points that llmq finds.
CODE_OF_METHODS = ("llmq/ptq", "llmq/grid", "llmq/models", "llmq/recipe.py", "kernels/llmq_kernels")
_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class RunError(Exception):
    """Why one run has no result; the others go on."""


@dataclass(frozen=True)
class Tool:
    """name: a method of llmq, or a peer. label: under which its results are kept, in place of the
    hash of llmq's code. options: of the method or of the peer. folder: what was written already, in
    place of a run; name is what the table calls it."""

    name: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> Tool:
        """Read NAME, NAME@LABEL, and either with :RECIPE or :{JSON} behind it."""
        head, _, options = text.partition(":")
        name, _, label = head.partition("@")
        if name not in (*METHODS, *PEER_PACKAGES):
            known = ", ".join((*METHODS, *PEER_PACKAGES))
            raise argparse.ArgumentTypeError(f"{name}: expected one of {known}")
        if label and name in PEER_PACKAGES:
            raise argparse.ArgumentTypeError(
                f"{text}: expected a label behind methods of llmq only"
            )
        recipes = RECIPES.get(name, {})
        if (recipe := options or "default") in recipes:
            return cls(name, label, recipes[recipe])
        try:
            return cls(name, label, json.loads(options or "{}"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text}: expected options as JSON behind the colon ({error})"
            ) from error

    @classmethod
    def written(cls, text: str) -> Tool:
        """Read NAME=FOLDER."""
        name, _, folder = text.partition("=")
        if not (name and Path(folder).is_dir()):
            raise argparse.ArgumentTypeError(f"{text}: expected NAME=FOLDER, a folder that exists")
        return cls(name, folder=folder)

    @property
    def is_peer(self) -> bool:
        return self.name in PEER_PACKAGES and not self.folder

    @property
    def needs_seeds(self) -> bool:
        """Whether the calibration text decides anything."""
        if self.folder:
            return False
        return self.is_peer or needs_text(Recipe.uniform("w4", method=self.name))

    def __str__(self) -> str:
        label = f"@{self.label}" if self.label else ""
        said = [f"{name} {value}" for name, value in self.options.items()]
        return f"{self.name}{label}" + (f" ({', '.join(said)})" if said else "")


@dataclass(frozen=True)
class Text:
    """What is measured on. n_windows: from its start, None for all."""

    name: str
    source: str
    n_windows: int | None = None

    @classmethod
    def parse(cls, text: str) -> Text:
        """Read NAME=SOURCE or NAME=SOURCE:N."""
        name, _, source = text.partition("=")
        if not (name and source):
            raise argparse.ArgumentTypeError(f"{text}: expected NAME=SOURCE or NAME=SOURCE:N")
        head, _, tail = source.rpartition(":")
        return cls(name, head, int(tail)) if tail.isdigit() else cls(name, source)

    def windows(self, model_dir: Path, length: int) -> Windows:
        """Disjoint windows of `length` tokens, begun with BOS for the families that are broken
        without it, and else without special tokens."""
        documents = load_documents(self.source, "eval")
        config = load_config(model_dir)
        bos: Bos = "every-window" if needs_bos(config) else "none"
        found = cut_windows(documents, load_tokenizer(model_dir), config, length, bos)
        return replace(found, tokens=found.tokens[: self.n_windows])


def hash_of_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_of_json(data: Any) -> str:
    """sha256 of data that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def hash_of_model(folder: Path) -> str:
    """sha256 of the weights and the configuration of a folder."""
    return hash_of_files(
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )


def hash_of_code(root: Path) -> str:
    """sha256 of the code that llmq's methods run, comments and docstrings aside, so that a result
    of other code is not taken for one of this."""
    digest = hashlib.sha256()
    for part in CODE_OF_METHODS:
        place = root / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(without_docstrings(path.read_text()).encode())
    return digest.hexdigest()


def without_docstrings(source: str) -> str:
    """What a module does: its syntax tree as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree)


def versions(python: str, packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages in the environment of an interpreter, None where one is missing."""
    command = [python, "-c", _VERSIONS, *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(python))
    except OSError as error:
        raise RunError(f"{python} does not start: {error}") from error
    if done.returncode:
        raise RunError(f"{python} does not start: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def environment(python: str, n_threads: int | None = None) -> dict[str, str]:
    """The variables of a process. Another environment's does not see this one's packages."""
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if python != sys.executable:
        found.pop("PYTHONPATH", None)
    if n_threads is not None:
        found |= {"OMP_NUM_THREADS": str(n_threads), "MKL_NUM_THREADS": str(n_threads)}
    return found


def run_measured(command: list[str], log_path: Path, n_threads: int) -> dict[str, float]:
    """Run a command of `quantize_with.py` and say what it took. Raises `RunError` with the end of
    what it printed."""
    usage_path = log_path.with_suffix(".usage.json")
    usage_path.unlink(missing_ok=True)
    started = time.monotonic()
    with log_path.open("w") as file:
        done = subprocess.run(
            [*command, "--usage", str(usage_path)],
            stdout=file,
            stderr=file,
            env=environment(command[0], n_threads),
        )
    seconds = round(time.monotonic() - started, 1)
    if done.returncode or not usage_path.exists():
        tail = log_path.read_text(errors="replace").strip().splitlines()[-3:]
        raise RunError(f"exit code {done.returncode} after {seconds} s: {' | '.join(tail)}")
    return {"wall_seconds": seconds, **json.loads(usage_path.read_text())}


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain float32 linear layers in place of the packed ones: the same values,
    without unpacking at every step."""
    for name, module in quantized_modules(model).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight.data = module.qtensor().dequantize()
        if module.bias is not None:
            plain.bias.data = module.bias.float()
        model.set_submodule(name, plain)
    return model


def measure(model_dir: Path, written: Path, texts: dict[str, Windows]) -> dict[str, Any]:
    """Figures of what a tool wrote on every text, those of single windows included, in float32.
    Raises `RunError` for what cannot be read."""
    folders = sorted(path.parent for path in written.rglob("config.json"))
    if not folders:
        raise RunError(f"{written}: no folder with a config.json was written")
    try:
        base = llmq.load(model_dir, dtype="float32")
        quant = dequantized(llmq.load(folders[0], dtype="float32"))
        figures = {name: figures_of(base, quant, text) for name, text in texts.items()}
    except Exception as error:  # whatever a file of another tool leads to
        raise RunError(
            f"what was written cannot be measured: {type(error).__name__}: {error}"
        ) from error
    n_bytes = sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    return {"figures": figures, "bytes": n_bytes, **layers_of(folders[0])}


def figures_of(base: PreTrainedModel, quant: PreTrainedModel, text: Windows) -> dict[str, Any]:
    """What `compare` says, and means of every window in nats."""
    table, classes = compare_tokens(base, quant, text)
    names = ("base_nll", "quant_nll", "kl")
    windows = {
        name: [round(value, 7) for value in table[name].mean(dim=1).tolist()] for name in names
    }
    return {**summarize(table, classes), "windows": windows}


def layers_of(folder: Path) -> dict[str, Any]:
    """How layers stand beside rounding, where llmq wrote a report: how many there are, how many
    have a larger error, and the largest ratio of errors."""
    path = folder / "report.json"
    if not path.exists():
        return {}
    layers = [each for each in json.loads(path.read_text())["layers"] if each["error"] is not None]
    ratios = [each["error"] / each["rtn_error"] for each in layers if each["rtn_error"]]
    if not ratios:
        return {}
    worse = sum(ratio > 1 for ratio in ratios)
    return {"layers": {"n": len(ratios), "worse_than_rounding": worse, "largest": max(ratios)}}


def emptied(folder: Path) -> None:
    """Make a folder without anything in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
