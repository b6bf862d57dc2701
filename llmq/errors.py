"""Errors that a user can act on. The command line prints them as one line and leaves with the exit
code they carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.messages import one_line


class LlmqError(Exception):
    """Bad usage or input: the message says what, where, what was expected, what came, and what to
    do next. Exit code 2."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class LostProcessError(LlmqError):
    """Another of the processes that work together is gone. What was finished is kept."""

    exit_code = 1


class LlmqWarning(UserWarning):
    """Something was done otherwise than one would expect, and the result is still good. The command
    line tells it on stderr and in the JSON under "warnings"."""


class VerificationError(LlmqError):
    """A result failed its own check, or too much of it fell back to a weaker method. details: what
    `--json` gives beside the message. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})
