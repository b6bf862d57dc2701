"""Processes that may not execute what they compile: what runs in them is found by trying it.

llmq's compiled kernels and oneDNN write machine code while they run. Where that is forbidden, or a
probe of a compiled kernel died, one child process tries every backend of the CPU (`trials`); oneDNN
is switched off for this process; and one warning says what runs and what does not. Elsewhere none
of this happens or costs anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

from llmq_kernels.core import execution, reference_backend
from llmq_kernels.core.errors import tell
from llmq_kernels.core.registry import BACKENDS

SECONDS = 300  # for the child; importing torch is most of it
ONEDNN = "oneDNN"
_PROGRAM = (
    "import sys; sys.path[:0] = sys.argv[1:]; "
    "from llmq_kernels.core.trials import report; print(report())"
)
_verdicts: dict[str, str | None] = {}
_lock = threading.Lock()


def reason() -> str | None:
    """Why this process has to try what runs, or None. Asked anew each time, in microseconds."""
    if told := execution.forbidden():
        return told
    dead = execution.this.dead
    return "; ".join(f"kernels for {form}: {why}" for form, why in dead.items()) or None


def verdict(name: str) -> str | None:
    """Why a backend does not run in this process, where that was tried, or None."""
    return _verdicts.get(name)


def use_onednn(enabled: bool) -> None:
    """Whether torch multiplies with oneDNN in this process."""
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]


def adapt() -> None:
    """Where this process is restricted, find out what runs in it and say so, once."""
    if _verdicts or (why := reason()) is None:
        return
    with _lock:
        if _verdicts:
            return
        found = _tried()
        if execution.forbidden() or found[ONEDNN]:
            use_onednn(False)
        _verdicts.update(found)
    fails = [name if told == why else f"{name} ({told})" for name, told in found.items() if told]
    runs = [name for name, told in found.items() if not told and name != ONEDNN]
    off = "" if torch.backends.mkldnn.enabled else "; oneDNN is off for this process"
    tell(f"{why}{off}. On the CPU run: {', '.join(runs)}. Not: {', '.join(fails) or 'none'}")


def _tried() -> dict[str, str | None]:
    """Backend (and oneDNN) -> why it does not run here, from the child. Nothing that needs the
    answer is known to run where there is none; `reference` always does."""
    roots = {
        str(Path(torch.__file__).resolve().parents[1]),
        str(Path(__file__).resolve().parents[2]),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, *sorted(roots)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=SECONDS,
            check=True,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        names = [ONEDNN, *(backend.name for backend in BACKENDS if backend.is_for_cpus())]
        answer = dict.fromkeys(names, f"could not be tried: {type(error).__name__}")
    return {**answer, reference_backend.BACKEND.name: None}
