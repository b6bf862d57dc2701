"""A sequence of kernel calls, made once and repeated for the price of starting them.

What a program computes with kernels of this package is noted instead of done, in the way of a CUDA
graph: addresses and sizes stay as they were, so new input goes where the old one lay. Python's own
part, of which a token through a small model is full, is then over before the first token.

Only kernel calls can be noted. Any operation of torch on the way that would compute something is
refused, since it would be missing from the repetition; allocations and views are no computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmq_kernels.compiled import threads

_ALLOCATIONS = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"})


class NotRecordable(Exception):
    """An operation that a recording would lack."""


class Recording(TorchDispatchMode):
    """`with Recording() as recording:` notes what is called inside, on this thread;
    `recording.replay()` does it. Memory that was allocated inside lives as long as the
    recording."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._kept: list[Tensor] = []

    def __enter__(self) -> Recording:
        self._token = threads.RECORDED.set(self._calls)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        threads.RECORDED.reset(self._token)

    def __len__(self) -> int:
        """How many kernels a repetition starts."""
        return len(self._calls)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_allocation = func._schema.name.removeprefix("aten::") in _ALLOCATIONS
        if not is_allocation and not func.is_view:
            raise NotRecordable(f"{func} is not one of llmq's kernels")
        result = func(*args, **(kwargs or {}))
        if is_allocation:
            self._kept.append(result)
        return result

    def replay(self) -> None:
        for call in self._calls:
            call()
