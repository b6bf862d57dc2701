"""Mixed bits from a job to a folder: costs of specs, measured once and kept; the choice; and both
it and the best uniform result run and measured on held-out text, of which the better one stays."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, VerificationError
from llmq.formats.registry import choose_format
from llmq.models.readers import CheckpointReader
from llmq.ptq import sensitivity
from llmq.ptq.blocks import Blocks
from llmq.ptq.budget import SOLVE_FACTOR, TEXT_FACTOR, disk_bytes, stored_bytes, work_bytes
from llmq.ptq.budget import flops as budget_flops
from llmq.ptq.choice import Budget, Choice
from llmq.ptq.costs import Cost
from llmq.ptq.engine import OnStep
from llmq.ptq.job import Job, check_unchanged
from llmq.ptq.methods import method_of
from llmq.ptq.mixed import Costs, Problem
from llmq.ptq.mixed_tables import table_plans
from llmq.ptq.results import BlockReport
from llmq.ptq.run import Attempt, identity, quantize_folder
from llmq.ptq.scales import with_scale_dtype
from llmq.ptq.table_costs import HEAD_TOKENS
from llmq.ptq.token_weights import kept_bytes
from llmq.storage import files, seals
from llmq.storage.boundary import running
from llmq.storage.workspace import STATE, check_output, remove_leftover, work_dir_of
from llmq.text.documents import SELF
from llmq_kernels.core.cache import cache_dir

MIXED, UNIFORM = "mixed", "uniform"  # the two results, as the report calls them
PASSES = 2  # forward, and once more; the gradients of inputs take as much again


@dataclass(frozen=True)
class MixedJob:
    """chosen: with the specs that were chosen. uniform: the best with one width, if there is one of
    about that size. about: both, for the report."""

    budget: Budget
    chosen: Job
    uniform: Job | None
    about: dict[str, Any]

    @property
    def trials(self) -> dict[str, Job]:
        """What is run and compared, in this order; empty where there is nothing to compare."""
        tokens = self.chosen.tokens
        if self.uniform is None or tokens is None or not tokens.held_out:
            return {}
        return {UNIFORM: self.uniform, MIXED: self.chosen}

    @property
    def disk_bytes(self) -> int:
        """What both results, and the files beside them, take at their largest: one waits while the
        other is made, until it is known which one is kept."""
        jobs = list(self.trials.values())
        waiting = [stored_bytes(job) + work_bytes(job) for job in jobs[1:]]
        before = sum(map(stored_bytes, jobs[:1]))
        return max([before + n for n in waiting] + list(map(disk_bytes, jobs or [self.chosen])))

    @property
    def flops(self) -> float:
        """Of all that is run, as `budget.flops` counts them."""
        return sum(map(budget_flops, self.trials.values() or [self.chosen]))


def kept_costs(job: Job, budget: Budget, device: str) -> Costs | None:
    """Those that were measured before, of the same model, text, recipe and candidates."""
    return _kept(_place(Problem.of(job, budget), device))


def _kept(path: Path) -> Costs | None:
    try:
        kept = seals.read_sealed(path)
    except files.DamagedError:
        return None
    return {
        name: {text: Cost(*values) for text, values in own.items()} for name, own in kept.items()
    }


def measured_costs(
    job: Job,
    budget: Budget,
    device: str,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """What every candidate costs every layer: kept, or measured now. on_block: see
    `sensitivity.measure`. Raises `LlmqError` without calibration text."""
    problem = Problem.of(job, budget)
    path = _place(problem, device)
    if (known := _kept(path)) is not None:
        return known
    if job.tokens is None:
        raise LlmqError(
            f"what bits are worth is measured on calibration text, and method {job.recipe.method} "
            "reads none; use --method gptq"
        )
    blocks = Blocks(job.model, CheckpointReader(job.model, job.source.tensors), device)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.check_space(
        path.parent,
        _cost_files(problem),
        "activations of what bits are worth",
        "set LLMQ_CACHE_DIR to a folder elsewhere or give fewer --samples",
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        found = running(job.source.folder)(sensitivity.measure)(
            blocks,
            job.tokens.tokens,
            problem.candidates,
            job.recipe,
            Path(folder),
            on_block,
            tables=problem.tables,
        )
    specs = problem.all_candidates
    costs = {
        name: {str(spec): cost for spec, cost in zip(specs[name], own, strict=True)}
        for name, own in found.items()
    }
    kept = {
        name: {text: [cost.nats, cost.scale_dtype] for text, cost in own.items()}
        for name, own in costs.items()
    }
    seals.write_sealed(path, kept)
    return costs


def _cost_files(problem: Problem) -> int:
    """Bytes on disk while the costs are measured: what enters all blocks, and inputs and gradients
    of the layers of one."""
    tokens = problem.job.tokens
    assert tokens is not None
    n_tokens, n_measured = sensitivity.n_tokens(tokens.tokens)
    config = problem.job.model.config.get_text_config()
    of_layers = 0.0
    for name in problem.candidates:
        (n, k), (token_share, share) = problem.shapes[name], problem.measured_shares(name)
        of_layers += 4 * token_share * share * (n_tokens * k + n_measured * n)
    kept = kept_bytes(n_tokens, config.hidden_size, config.num_hidden_layers)
    return int(kept + of_layers / config.num_hidden_layers)


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
    specs = {name: list(map(str, own)) for name, own in problem.all_candidates.items()}
    most = [sensitivity.MAX_SEQUENCES, sensitivity.MAX_MEASURED, sensitivity.MAX_LENGTH]
    decides["measured"] = {
        "specs": specs,
        "of windows": most,
        "gives": "nats, scale dtype",
        "without": "first positions",
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "sensitivity" / f"{key[:32]}.json"


def flops(job: Job, budget: Budget) -> float:
    """Floating-point operations of measuring the costs, weighed as `budget.flops` does."""
    problem = Problem.of(job, budget)
    n_tokens, n_measured = (0, 0) if job.tokens is None else sensitivity.n_tokens(job.tokens.tokens)
    passes = solves = 0.0
    method = method_of(job.recipe)
    for name, specs in problem.candidates.items():
        shape = problem.shapes[name]
        token_share, share = problem.measured_shares(name)
        n_products = PASSES * n_tokens + (PASSES + share * len(specs)) * n_measured
        passes += 2 * token_share * prod(shape) * n_products
        solves += share * len(specs) * method.solve_flops(shape)
    for table, specs in problem.tables.items():
        passes += 2 * 2 * min(n_measured, HEAD_TOKENS) * prod(table.shape) * len(specs)
    return TEXT_FACTOR * passes + SOLVE_FACTOR * solves


def choose(
    job: Job, costs: Costs, budget: Budget, *, format: str = "auto", strict: bool = False
) -> MixedJob:
    """The jobs of a budget. job: prepared for one. format, strict: as `prepare` takes them. Raises
    `LlmqError` for a budget that is too small."""
    problem = Problem.of(job, budget)
    choice, uniform = problem.choose(costs, budget), problem.uniform(costs, budget)
    if uniform is not None and uniform.decides == choice.decides:
        uniform = None
    about = {
        "asked": str(budget),
        "kept": None,  # nothing was run so far
        MIXED: choice.to_json(),
        UNIFORM: None if uniform is None else uniform.to_json(),
    }
    chosen = _job_of(choice, job, format, strict)
    return MixedJob(
        budget, chosen, None if uniform is None else _job_of(uniform, job, format, strict), about
    )


def _job_of(choice: Choice, job: Job, format: str, strict: bool) -> Job:
    """The job with other specs: no weight is read for it."""
    specs = choice.specs
    plans = [
        with_scale_dtype(plan, specs[plan.layer.name]) if plan.layer.name in specs else plan
        for plan in job.plans
    ]
    outside = (*job.outside, *table_plans(choice.tables))
    recipe, every = choice.recipe(job.recipe), [*plans, *outside]
    is_ordered = recipe.order == "act"
    fmt = choose_format(format, every, recipe.activations, act_order=is_ordered)
    if strict:
        check_unchanged(every)
    return replace(job, recipe=recipe, plans=plans, outside=outside, fmt=fmt)


def quantize_mixed(
    mixed: MixedJob,
    out_dir: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    max_ram: int | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    on_step: OnStep = lambda what, done, total: None,
) -> dict[str, Any]:
    """As `quantize_folder`, of the choice and of the uniform result, one after the other; the one
    that loses less on held-out text stays. An interrupted run goes on with either. on_start: told
    once for all blocks of both."""
    check_output(out_dir, overwrite)
    started = time.monotonic()
    about, kept = {**mixed.about, "kept": MIXED}, MIXED
    how = {"device": device, "overwrite": overwrite, "max_ram": max_ram}
    how |= {"on_block": on_block, "on_step": on_step}
    run = _Run(out_dir, how, on_start)
    if trials := mixed.trials:
        run.measure(trials)
        for name in trials:
            about[name] = {**about[name], "held_out_kl": run.losses[name]}
        if _gain(run.losses[MIXED], run.losses[UNIFORM]) < 0:
            about["kept"] = kept = UNIFORM
        loser = Attempt(_variant(UNIFORM if kept == MIXED else MIXED)).place(out_dir)
        remove_leftover(work_dir_of(loser), STATE, lambda: True)
    job = trials.get(kept, mixed.chosen)
    report = run.finish(kept, job, Attempt(started=started, about={"mixed": about}))
    limit = mixed.budget.n_bytes
    if limit is not None and report["stored_bytes"] > limit:
        raise VerificationError(
            f"{out_dir}: written, but its weight files have {report['stored_bytes']} bytes, more "
            f"than --max-bytes {limit}; give {2 * limit - report['stored_bytes']}"
        )
    return report


def _variant(name: str) -> str:
    """Of the output, whose work folder has the result."""
    return "" if name == MIXED else f".{name}"


@dataclass
class _Run:
    """options: of every run into the folder. losses: mean divergence on each held-out text, by
    name of result; None where it could not be measured. resumed_at: of the results that were made
    now, the first block that was not there before. n_blocks: of those told to `on_start`."""

    out_dir: Path
    options: dict[str, Any]
    on_start: Callable[[int, int], None]
    losses: dict[str, list[float | None]] = field(default_factory=dict)
    resumed_at: dict[str, int] = field(default_factory=dict)

    def measure(self, trials: Mapping[str, Job]) -> None:
        """What results lose, which is kept for a run that goes on."""
        places = {name: _loss_place(job, self.options["device"]) for name, job in trials.items()}
        for name, place in places.items():
            with suppress(files.DamagedError):
                self.losses[name] = seals.read_sealed(place)
        missing = [name for name in trials if name not in self.losses]
        for number, name in enumerate(missing):
            later = sum(stored_bytes(trials[other]) for other in missing[number + 1 :])
            attempt = Attempt(_variant(name), is_trial=True, later_bytes=later)
            report = self._quantized(trials[name], attempt, number, len(missing))
            self.resumed_at[name] = report["resumed_at_block"]
            self.losses[name] = [text.get("kl_mean") for text in report["held_out"]]
            seals.write_sealed(places[name], self.losses[name])

    def finish(self, name: str, job: Job, attempt: Attempt) -> dict[str, Any]:
        """Publish a result, whose blocks may be there. Of those that were made now, all was told
        before."""
        attempt = replace(attempt, variant=_variant(name), resumed_at=self.resumed_at.get(name))
        return self._quantized(job, attempt, 0, 0 if name in self.resumed_at else 1)

    def _quantized(self, job: Job, attempt: Attempt, number: int, n_runs: int) -> dict[str, Any]:
        """number: of this run. n_runs: those whose blocks are told as one, 0 for none."""

        def start(done: int, total: int) -> None:
            if n_runs and (number == 0 or done):
                self.on_start(number * total + done, n_runs * total)

        return quantize_folder(job, self.out_dir, attempt=attempt, on_start=start, **self.options)


def _loss_place(job: Job, device: str) -> Path:
    decides = json.dumps(identity(job, device), sort_keys=True)
    key = hashlib.sha256(decides.encode()).hexdigest()
    return cache_dir() / "sensitivity" / f"held-out-{key[:32]}.json"


def _gain(mixed: list[float | None], uniform: list[float | None]) -> float:
    """Mean over texts of the logarithm of the ratio of divergences, above 0 where the choice is
    better; 0 where nothing was measured."""
    logs = [math.log(u / m) for m, u in zip(mixed, uniform, strict=True) if m and u]
    return sum(logs) / max(1, len(logs))
