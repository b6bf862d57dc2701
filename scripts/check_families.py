"""Whether models of many families come out of quantization as they should.

    python scripts/check_families.py FOLDER... [--method gptq] [--bits 4] [--json]

Each folder holds a small model with a tokenizer, in full precision. It is quantized into a
temporary folder and read back; then these are compared:

- its logits with those of the same model quantized in memory, bit for bit;
- its logits in transformers, opened as the class that its config names, with llmq's own;
- the names of its tensors with those of the source: what is neither there nor packed is missing.

A line for each: "equal", "refused" with the sentence, or "TRACEBACK"; "DIFFERS" says in what. Exit
code 1 if any is neither equal nor refused."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import llmq
from llmq.errors import LlmqError, LlmqWarning
from llmq.inference.module import quantized_modules
from llmq.models.source import Source
from llmq.ptq.job import Job, prepare
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

N_TOKENS = 24  # of the text whose logits are compared


@dataclass
class Outcome:
    """What became of a model. verdict: equal, refused, DIFFERS or TRACEBACK. n_kept: linear layers
    of the blocks in full precision. share: of the weights of all others but those that are kept by
    default."""

    kind: str
    method: str = ""
    transformers: str = transformers.__version__
    verdict: str = "equal"
    says: str = ""
    n_quantized: int = 0
    n_kept: int = 0
    share: float = 0.0
    format: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ""
        if self.n_quantized:
            counts = f"{self.n_quantized} quantized ({self.share:.1%}), {self.n_kept} kept, "
            counts += f"{self.format}, {self.seconds:.1f} s"
        return f"{self.verdict:9s} {self.kind:20s} {'; '.join([counts, *self.faults, self.says])}"


def check(folder: Path, recipe: Recipe, format: str) -> Outcome:
    """Quantize, read back, compare."""
    outcome, started = Outcome(folder.name, recipe.method), time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="llmq-families-") as work_dir:
            _check(folder, Path(work_dir) / "out", recipe, format, outcome)
    except LlmqError as error:
        outcome.verdict, outcome.says = "refused", str(error).replace(str(folder), folder.name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.verdict = "TRACEBACK"
        where = f"{Path(place.filename).name}:{place.lineno}"
        outcome.says = f"{type(error).__name__} in {where}: {str(error)[:200]}"
        traceback.print_exc(file=sys.stderr)
    if outcome.faults:
        outcome.verdict = "DIFFERS"
    outcome.seconds = time.monotonic() - started
    return outcome


def _check(folder: Path, out_dir: Path, recipe: Recipe, format: str, outcome: Outcome) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LlmqWarning)  # the tokenizers of such models are borrowed
        job = prepare(str(folder), recipe, format=format, held_out=False)
    quantize_folder(job, out_dir)
    outcome.format = job.fmt.name
    outcome.n_quantized = sum(plan.spec is not None for plan in job.plans)
    outcome.n_kept = len(job.plans) - outcome.n_quantized
    outcome.share = _quantized_share(job)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = llmq.load(out_dir, dtype="float32")
    outcome.faults += [str(each.message) for each in told if each.category is LlmqWarning]
    logits = _logits(loaded)
    in_memory = llmq.load(folder, dtype="float32")
    full = _logits(in_memory)
    llmq.quantize(in_memory, job.recipe, tokens=None if job.tokens is None else job.tokens.tokens)
    _compare("the model in memory", logits, _logits(in_memory), outcome)
    if torch.equal(logits, full):
        outcome.faults.append("quantization changed nothing")
    if not bool(torch.isfinite(logits).all()):
        outcome.faults.append("logits are not finite")
    if outcome.n_quantized != len(quantized_modules(loaded)):
        outcome.faults.append(f"{len(quantized_modules(loaded))} layers are loaded as quantized")
    _compare("its own class", logits, _logits(_by_own_class(out_dir)), outcome)
    missing = missing_tensors(Source(folder), Source(out_dir))
    if missing:
        outcome.faults.append(f"{len(missing)} tensors are missing, the first {missing[0]}")


def _quantized_share(job: Job) -> float:
    """Of the weights of the linear layers that are not kept by default."""
    sizes = [
        (plan.spec is not None, *plan.layer.shape) for plan in job.plans if not plan.layer.kept
    ]
    every = sum(n * k for _, n, k in sizes)
    return sum(n * k for is_quantized, n, k in sizes if is_quantized) / max(1, every)


def _compare(name: str, logits: Tensor, others: Tensor, outcome: Outcome) -> None:
    if logits.shape != others.shape:
        outcome.faults.append(f"logits of {name} are {list(others.shape)}, not {logits.shape}")
    elif not torch.equal(logits, others):
        distance = float((logits - others).norm() / logits.norm())
        outcome.faults.append(f"logits of {name} are {distance:.1e} off")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """float32 `[T, vocabulary]`, of the same tokens for all."""
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(3, vocab_size, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0].float()


def _by_own_class(folder: Path) -> PreTrainedModel:
    """The folder as transformers opens it by the class that config.json names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()


def missing_tensors(source: Source, result: Source) -> list[str]:
    """Tensors of a source that the result has neither as they were nor packed. Experts that are
    one tensor in the source are many in the result."""
    there = result.shards.names
    packed = {name.rpartition(".")[0] for name in there}
    return [
        name
        for name in sorted(source.shards.names)
        if name not in there
        and name.removesuffix(".weight") not in packed
        and not any(_is_part_of(other, name) for other in there)
    ]


def _is_part_of(name: str, fused: str) -> bool:
    """Whether a tensor belongs to one expert of a fused tensor."""
    parent = fused.removesuffix(".weight").rpartition(".")[0]
    rest = name.removeprefix(f"{parent}.")
    return rest != name and (rest.split(".")[0].isdigit() or rest.startswith("experts."))


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--calibration", default="bundled")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(None if arguments is None else list(arguments))
    recipe = Recipe.uniform(
        f"w{args.bits}g{args.group_size}",
        method=args.method,
        calibration=args.calibration,
        samples=args.samples,
        sequence_length=args.sequence_length,
        iterations=4,
    )
    transformers.logging.set_verbosity_error()
    outcomes = []
    for folder in args.folders:
        outcomes.append(check(folder, recipe, args.format))
        line: Any = json.dumps(asdict(outcomes[-1])) if args.json else outcomes[-1]
        print(line, flush=True)
    verdicts = [each.verdict for each in outcomes]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    version = transformers.__version__
    print(f"transformers {version}, {args.method}: {counts}", file=sys.stderr)
    return int(not {"equal", "refused"}.issuperset(verdicts))


if __name__ == "__main__":
    sys.exit(main())
