"""Rotary embeddings whose frequencies change with the length of the text, one thread at a time.

transformers keeps the frequencies of such a model (dynamic NTK, LongRoPE) in the module, sets them
for the text it sees and computes with them: a thread with a long text changes them under one with
a short text. Computing them is a small part of a token, so the threads take turns.

What stays as it is in transformers: with dynamic NTK, frequencies of the longest text so far serve
all that are longer than the model was trained for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmq.models.compat import rotary_types

_ROTATING = threading.Lock()


def _alone(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    with _ROTATING:
        return forward(*args, **kwargs)


def take_turns(model: nn.Module) -> None:
    """Have the rotary embeddings of `model` that change, if any, compute one at a time, in
    place."""
    for module in model.modules():
        if _changes(module) and not isinstance(module.forward, functools.partial):
            alone = functools.partial(_alone, module.forward)
            module.forward = alone  # type: ignore[method-assign]


def _changes(module: nn.Module) -> bool:
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in rotary_types(module))
