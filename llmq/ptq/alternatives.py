"""The same job with other options, for advice: what takes less time, what takes less memory."""

from __future__ import annotations

from dataclasses import replace

from llmq.errors import LlmqError
from llmq.ptq.budget import peak_bytes
from llmq.ptq.job import Job
from llmq.ptq.methods import METHODS, method_of, needs_text
from llmq.ptq.sizing import windows_for
from llmq.text.documents import TokenSet


def quick_job(job: Job) -> Job | None:
    """The job as `--quick` has it, or None where that is no less text. Its tokens have a size and
    no contents."""
    windows = windows_for(job.config, quick=True)
    if job.tokens is None or windows.n_tokens >= job.tokens.n_tokens:
        return None
    recipe = replace(job.recipe, samples=windows.n_sequences, sequence_length=windows.length)
    unread = TokenSet.unread(job.tokens.source, windows.n_sequences, windows.length)
    # What is measured afterwards is as much as before.
    return replace(job, recipe=recipe, tokens=replace(unread, held_out=job.tokens.held_out))


def lighter_methods(job: Job, limit: float) -> dict[str, int]:
    """Methods whose peak memory is within a limit, in bytes, and below that of the job: the last of
    the ladder, which is the best, first."""
    found, peak = {}, peak_bytes(job)
    for name in reversed(METHODS):
        if name == job.recipe.method:
            continue
        recipe = job.recipe.changed(method=name, init="gptq")
        try:
            method_of(recipe)
        except LlmqError:
            continue  # does not go with the rest of the recipe
        wants_text = needs_text(recipe)
        if wants_text and job.tokens is None:
            continue
        other = replace(job, recipe=recipe, tokens=job.tokens if wants_text else None)
        if (n_bytes := peak_bytes(other)) <= limit and n_bytes < peak:
            found[name] = n_bytes
    return found
