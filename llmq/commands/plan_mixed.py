"""What `llmq plan` says of a budget of bits: which ones were chosen, and what both results take."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.commands import jobs, rendering
from llmq.commands.pace import rough_duration

if TYPE_CHECKING:
    from llmq.ptq.choice import Budget
    from llmq.ptq.job import Job


@dataclass(frozen=True)
class Planned:
    """job: of the result, or, where nothing was chosen yet, with the spec that stands for all.
    about: how it was chosen, for the JSON; None without a budget. n_results: made until one is
    kept. disk_bytes, flops: of all that is run."""

    job: Job
    about: dict[str, Any] | None
    n_results: int
    disk_bytes: int
    flops: float


def planned(args: argparse.Namespace, job: Job, budget: Budget | None, rate: float) -> Planned:
    """rate: in FLOP/s. Raises `LlmqError` for a budget that is too small, and for models whose bits
    cannot be chosen."""
    from llmq.models.config_only import ConfigOnly
    from llmq.ptq import mixed_run
    from llmq.ptq.budget import disk_bytes, flops, stored_bytes

    if budget is None:
        return Planned(job, None, 1, disk_bytes(job), flops(job))
    is_bare = isinstance(job.source, ConfigOnly)
    costs = None if is_bare else mixed_run.kept_costs(job, budget, args.device)
    if costs is not None:
        found = jobs.mixed_job(args, job, budget, costs)
        n_results = len(found.trials) or 1
        return Planned(found.chosen, found.about, n_results, found.disk_bytes, found.flops)
    about = {
        "asked": str(budget),
        "mixed": None,
        "planned_seconds": round(mixed_run.flops(job, budget) / rate, 1),
    }
    if job.tokens is None or not job.tokens.held_out:
        return Planned(job, about, 1, disk_bytes(job), flops(job))
    return Planned(job, about, 2, disk_bytes(job) + stored_bytes(job), 2 * flops(job))


def pairs(mixed: dict[str, Any] | None) -> dict[str, object]:
    """The lines about what was chosen."""
    if mixed is None or mixed["mixed"] is not None:
        return rendering.mixed_lines(mixed)
    line = (
        "not chosen yet: 'llmq quantize' measures what bits are worth first, in about "
        f"{rough_duration(mixed['planned_seconds'])}; sizes here are those of the spec that stands "
        "for all"
    )
    return {"mixed bits": line}


def results_remark(n_results: int) -> str:
    """Behind what disk and time there is."""
    if n_results < 2:
        return ""
    return ", for two results: the chosen bits and one width, of which the better one stays"
