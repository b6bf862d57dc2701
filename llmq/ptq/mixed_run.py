"""Mixed bits from a job to a folder: costs of specs, measured once and kept; the choice; and both
it and the best uniform result run and measured on held-out text, of which the better one stays."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, VerificationError
from llmq.models.readers import CheckpointReader
from llmq.ptq import sensitivity
from llmq.ptq.blocks import Blocks
from llmq.ptq.budget import SOLVE_FACTOR, TEXT_FACTOR
from llmq.ptq.job import Job, prepare
from llmq.ptq.methods import method_of
from llmq.ptq.mixed import Budget, Costs, Problem
from llmq.ptq.results import BlockReport
from llmq.ptq.run import Attempt, identity, quantize_folder
from llmq.recipe import Recipe
from llmq.storage import files, seals
from llmq.storage.boundary import running
from llmq.storage.workspace import STATE, check_output, remove_leftover, work_dir_of
from llmq.text.documents import SELF
from llmq_kernels.core.cache import cache_dir

UNIFORM = ".uniform"  # variant of the output whose work folder has that result
PASSES = 4  # forward, once more, and the gradients of inputs, which take as much again


@dataclass(frozen=True)
class MixedJob:
    """base: as it was asked for. chosen: with the specs that were chosen. uniform: the best with
    one width, if there is one of about that size. about: both, for the report."""

    base: Job
    budget: Budget
    chosen: Job
    uniform: Job | None
    about: dict[str, Any]


def kept_costs(job: Job, device: str) -> Costs | None:
    """Those that were measured before, of the same model, text, recipe and candidates."""
    try:
        found: Costs = seals.read_sealed(_place(Problem.of(job), device))
    except files.DamagedError:
        return None
    return found


def measured_costs(
    job: Job, device: str, on_block: Callable[[int, int], None] = lambda done, total: None
) -> Costs:
    """What every candidate costs every layer: kept, or measured now. on_block: see
    `sensitivity.measure`. Raises `LlmqError` without calibration text."""
    problem = Problem.of(job)
    if (known := kept_costs(job, device)) is not None:
        return known
    if job.tokens is None:
        raise LlmqError(
            f"what bits are worth is measured on calibration text, and method {job.recipe.method} "
            "reads none; use --method gptq"
        )
    blocks = Blocks(job.model, CheckpointReader(job.model, job.source.tensors), device)
    path = _place(problem, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        found = running(job.source.folder)(sensitivity.measure)(
            blocks,
            job.tokens.tokens,
            problem.candidates,
            job.recipe,
            Path(folder),
            on_block,
        )
    costs = {
        name: {str(s): cost for s, cost in zip(problem.candidates[name], own, strict=True)}
        for name, own in found.items()
    }
    seals.write_sealed(path, costs)
    return costs


def _place(problem: Problem, device: str) -> Path:
    """Where the costs are kept, by everything that decides them."""
    job = problem.job
    decides = identity(replace(job, tokens=None), device)
    recipe = job.recipe.to_json()
    del recipe["rules"], recipe["calibration"]
    text = None
    if job.tokens is not None:  # what the model writes is decided by the rest
        text = SELF if job.tokens.source == SELF else job.tokens.sha256
    decides |= {"recipe": recipe, "format": "", "calibration text": text}
    specs = {name: list(map(str, own)) for name, own in problem.candidates.items()}
    decides["measured"] = [specs, sensitivity.MAX_SEQUENCES, sensitivity.MAX_LENGTH]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "sensitivity" / f"{key[:32]}.json"


def flops(job: Job) -> float:
    """Floating-point operations of measuring the costs, weighed as `budget.flops` does."""
    problem = Problem.of(job)
    n_tokens = 0 if job.tokens is None else job.tokens.tokens[:, : sensitivity.MAX_LENGTH].numel()
    n_tokens = min(n_tokens, sensitivity.MAX_SEQUENCES * sensitivity.MAX_LENGTH)
    passes = solves = 0.0
    method = method_of(job.recipe)
    for name, specs in problem.candidates.items():
        shape = problem.shapes[name]
        passes += 2 * n_tokens * prod(shape) * (PASSES + len(specs))
        solves += len(specs) * method.solve_flops(shape)
    return TEXT_FACTOR * passes + SOLVE_FACTOR * solves


def choose(
    job: Job, costs: Costs, budget: Budget, *, format: str = "auto", **options: Any
) -> MixedJob:
    """The jobs of a budget. format, options: as `prepare` takes them. Raises `LlmqError` for a
    budget that is too small."""
    problem = Problem.of(job)
    choice, uniform = problem.choose(costs, budget), problem.uniform(costs, budget)
    if uniform is not None and uniform.specs == choice.specs:
        uniform = None

    def job_of(recipe: Recipe) -> Job:
        given = {"calibration": job.tokens, "format": format, **options}
        return prepare(job.source, recipe, **given)

    about = {
        "asked": str(budget),
        "kept": None,  # nothing was run so far
        "mixed": choice.to_json(),
        "uniform": None if uniform is None else uniform.to_json(),
    }
    return MixedJob(
        job,
        budget,
        job_of(choice.recipe(job.recipe)),
        None if uniform is None else job_of(uniform.recipe(job.recipe)),
        about,
    )


def quantize_mixed(
    mixed: MixedJob,
    out_dir: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> dict[str, Any]:
    """As `quantize_folder`, of the choice and of the uniform result, one after the other; the one
    that loses less on held-out text stays. An interrupted run goes on with either."""
    check_output(out_dir, overwrite)
    options: dict[str, Any] = {
        "device": device,
        "overwrite": overwrite,
        "on_start": on_start,
        "on_block": on_block,
    }
    started = time.monotonic()
    about, kept, variant = {**mixed.about, "kept": "mixed"}, mixed.chosen, ""
    tokens = mixed.chosen.tokens
    if mixed.uniform is not None and tokens is not None and tokens.held_out:
        for name, job, of_job in (
            ("uniform", mixed.uniform, UNIFORM),
            ("mixed", mixed.chosen, ""),
        ):
            found = _trial(job, out_dir, of_job, options)
            about[name] = {**about[name], "held_out_kl": found}
        if _gain(about["mixed"]["held_out_kl"], about["uniform"]["held_out_kl"]) < 0:
            about["kept"], kept, variant = "uniform", mixed.uniform, UNIFORM
        loser = Attempt("" if variant else UNIFORM).place(out_dir)
        remove_leftover(work_dir_of(loser), STATE, lambda: True)
    attempt = Attempt(variant, started=started, about={"mixed": about})
    report = quantize_folder(kept, out_dir, attempt=attempt, **options)
    limit = mixed.budget.n_bytes
    if limit is not None and report["stored_bytes"] > limit:
        raise VerificationError(
            f"{out_dir}: written, but its weight files have {report['stored_bytes']} bytes, more "
            f"than --max-bytes {limit}; give {2 * limit - report['stored_bytes']}"
        )
    return report


def _trial(job: Job, out_dir: Path, variant: str, options: dict[str, Any]) -> list[float | None]:
    """Mean divergence on each held-out text, which is kept for a run that goes on; None where it
    could not be measured."""
    decides = json.dumps(identity(job, options["device"]), sort_keys=True)
    key = hashlib.sha256(decides.encode()).hexdigest()
    path = cache_dir() / "sensitivity" / f"held-out-{key[:32]}.json"
    try:
        known: list[float | None] = seals.read_sealed(path)
    except files.DamagedError:
        report = quantize_folder(job, out_dir, attempt=Attempt(variant, is_trial=True), **options)
        known = [text.get("kl_mean") for text in report["held_out"]]
        seals.write_sealed(path, known)
    return known


def _gain(mixed: list[float | None], uniform: list[float | None]) -> float:
    """Mean over texts of the logarithm of the ratio of divergences, above 0 where the choice is
    better; 0 where nothing was measured."""
    logs = [math.log(u / m) for m, u in zip(mixed, uniform, strict=True) if m and u]
    return sum(logs) / max(1, len(logs))
