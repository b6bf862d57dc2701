"""What callers may want to tell apart from defects."""

from __future__ import annotations

import warnings


class SettingError(ValueError):
    """An environment variable of the user's (`LLMQ_BACKEND`, `LLMQ_COMPUTE`) asks for what does not
    exist or cannot be done. The message names it and what to do."""


class KernelDied(RuntimeError):
    """A kernel cannot run in this process: a probe of it died, or memory may not be executable any
    more. Whoever asked for it takes another backend; none of its form is offered again."""


class KernelWarning(UserWarning):
    """Something was done otherwise than one would expect, and the result is still good."""


_told: set[str] = set()


def tell(message: str) -> None:
    """Warn in one line, which no source line follows; once in a process for each message."""
    if message not in _told:
        _told.add(message)
        warnings.warn_explicit(message, KernelWarning, filename="llmq", lineno=1)
