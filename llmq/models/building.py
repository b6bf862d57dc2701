"""One model is built at a time.

While transformers builds one it changes the whole process, not only its own thread: the default
dtype, how weights are initialised and tied, how talkative it is, and accelerate patches every
module. Each puts back what it found, so two that overlap leave one's change behind for good:
eight threads that load end without tied heads, all of them, and every later load of the process as
well. What runs in other threads meanwhile sees the changed default dtype, which is why nothing of
llmq's allocates by it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_BUILDING = threading.RLock()  # re-entrant: who loads a model may build one on the way


def one_at_a_time(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """`function`, waiting until no other thread is in one of those that this was put on."""

    @functools.wraps(function)
    def alone(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with _BUILDING:
            return function(*args, **kwargs)

    return alone
