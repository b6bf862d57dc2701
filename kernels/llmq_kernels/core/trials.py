"""Trying backends: with small weights of the kinds that they declare."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from llmq_kernels.core import execution, reference_backend
from llmq_kernels.core.backend import Backend
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import pack
from llmq_kernels.core.registry import BACKENDS
from llmq_kernels.core.restricted import ONEDNN, use_onednn
from llmq_kernels.core.weight import PackedWeight

Trial = Callable[[], str | None]
SECONDS = 60  # for each
N, K = 64, 128
TOKENS = (1, 64)  # one for the kernels that take few, one for those that take many
MOST_ERROR = 0.05  # relative; what does not run as it should is off by orders


def samples(backend: Backend) -> Iterator[tuple[PackedWeight, torch.dtype]]:
    """A weight with one scale per row for each kind of activations and dtype that is declared."""
    for takes in backend.takes:
        code = CODES["int4"] if takes.codes is None else takes.codes[0]
        codes = (torch.arange(N * K) % code.levels).to(torch.uint8).view(N, K)
        scale = torch.full((N, 1), 0.01, dtype=torch.float16)
        for activations, dtype in itertools.product(takes.activations, takes.dtypes):
            input_range = torch.tensor([0.02, 128.0]) if activations == "int8-static" else None
            yield (
                PackedWeight(
                    *(pack(codes, code.bits), scale, None, None, code, K, (N, K)),
                    activations,
                    input_range,
                ),
                dtype,
            )


def obstacle(backend: Backend, devices: Sequence[torch.device]) -> str | None:
    """Why a backend runs on none of these devices, or None: the machine's reason, since it is asked
    with weights that the backend was built for."""
    reasons = [
        backend.refusal(weight, dtype, device)
        for device in devices
        for weight, dtype in samples(backend)
    ]
    return None if None in reasons else reasons[0]


def products(backend: Backend) -> str | None:
    """Why a backend does not run on the CPU, or None; tried in this process."""
    device, refused = torch.device("cpu"), None
    n_tried = 0
    for weight, dtype in samples(backend):
        if refusal := backend.refusal(weight, dtype, device):
            refused = refused or refusal
            continue
        n_tried += 1
        state = backend.prepare(weight, dtype)
        held = replace(weight, packed=state.get("packed", weight.packed))
        for m in TOKENS:
            x = torch.linspace(-1, 1, m * K).view(m, K).to(dtype)
            expected = reference_backend.linear(x.float(), weight, {})
            error = (backend.linear(x, held, state).float() - expected).norm() / expected.norm()
            if not error < MOST_ERROR:
                return f"its results are wrong by {float(error):.2g}"
    return None if n_tried else refused


def onednn() -> str | None:
    """Products and a convolution as models have them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, taps = torch.ones(N, K, dtype=dtype), torch.ones(8, 1, 4, dtype=dtype)
        for m in TOKENS:
            torch.nn.functional.linear(torch.ones(m, K, dtype=dtype), weight)
        torch.nn.functional.conv1d(torch.ones(1, 8, 16, dtype=dtype), taps, groups=8)
    return None


# --- in a child process ---------------------------------------------------------------------------


def report() -> str:
    """JSON: name -> why it does not run in such a process, or null. For the child that `restricted`
    starts, in which nothing has run before: each trial is made in a fork."""
    execution.this.is_trial = True
    answers = {ONEDNN: _forked(onednn)}
    use_onednn(not (answers[ONEDNN] or execution.forbidden()))
    for backend in BACKENDS:
        if backend.is_for_cpus():
            answers[backend.name] = _forked(partial(products, backend))
    return json.dumps(answers)


def _forked(trial: Trial) -> str | None:
    """What a trial says, in a process of its own, whose end is no end of this one."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(out)
            signal.alarm(SECONDS)
            try:
                told = trial() or ""
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            os.write(into, b"+" + " ".join(told.split())[:300].encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if answer.startswith("+"):
        return answer[1:] or None
    return f"a trial of it was ended by signal {os.WTERMSIG(status)}"
