"""Whether a product may round its activations, where the checkpoint does not say so: a choice of
whoever runs a model, made at run time and never saved.

"exact" (the default): activations stay what they are, 16 or 32 bits. "int8": on a CPU, weights that
integer kernels exist for are multiplied with activations quantized to INT8: per token and group of
columns by llmq's own kernels (x86-64), per token with a zero point by KleidiAI's (ARM64). That
makes decoding up to twice as fast and costs a little accuracy, which `llmq eval --compute int8`
measures.

A mode of the run and not of the weight: the same folder serves both, and checkpoints of other tools
too. It travels to the kernels as the weight's `activations`, so backends need no second switch, and
a layer that the integer kernels cannot take stays exact instead of being emulated."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from llmq_kernels.core import reference_backend, trials
from llmq_kernels.core.backend import Backend
from llmq_kernels.core.errors import SettingError
from llmq_kernels.core.registry import BACKENDS
from llmq_kernels.core.weight import RUN_TIME_ACTIVATIONS, PackedWeight

MODES = ("exact", "int8")


def default_mode() -> str:
    """What `LLMQ_COMPUTE` says, else "exact". Raises `SettingError` for anything else."""
    mode = os.environ.get("LLMQ_COMPUTE") or "exact"
    if mode not in MODES:
        raise SettingError(f"LLMQ_COMPUTE={mode}: expected one of {', '.join(MODES)}")
    return mode


def refusal(mode: str, device: torch.device) -> str | None:
    """Why this machine cannot do what a mode asks for, or None. On other devices than a CPU "int8"
    changes nothing, which is no reason to refuse it."""
    if mode == "exact" or device.type != "cpu":
        return None
    reasons = {backend.name: trials.obstacle(backend, [device]) for backend in _integer_backends()}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def at_run_time(
    weight: PackedWeight, mode: str, dtype: torch.dtype, device: torch.device
) -> PackedWeight:
    """The weight with the activations it will be multiplied with."""
    if mode == "exact" or weight.activations != "none":
        return weight
    for kind in RUN_TIME_ACTIVATIONS:
        rounded = replace(weight, activations=kind)
        if any(backend.refusal(rounded, dtype, device) is None for backend in _integer_backends()):
            return rounded
    return weight


def _integer_backends() -> list[Backend]:
    """Those with kernels for activations that are rounded at run time."""
    return [backend for backend in BACKENDS if _rounds(backend)]


def _rounds(backend: Backend) -> bool:
    kinds = {kind for takes in backend.takes for kind in takes.activations}
    return backend is not reference_backend.BACKEND and bool(
        kinds.intersection(RUN_TIME_ACTIVATIONS)
    )
