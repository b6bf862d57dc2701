"""Patterns of others: regular expressions and shell patterns from recipes and checkpoints, matched
within bounds. Some need exponential time on a name of thirty characters, and some a tree of 10^9
nodes. So `re` decides what a pattern may be, its repetitions are counted before it is compiled, and
the `regex` package, which can be told to give up, does the matching."""

from __future__ import annotations

import fnmatch
import re
import time
from functools import lru_cache

import regex

from llmq.errors import LlmqError

MAX_LENGTH = 1000
MAX_REPETITIONS = 10_000
MAX_DEPTH = 100  # of groups in groups, which compilers go down by recursion
MAX_SECONDS = 1.0  # of a match
MAX_TOTAL_SECONDS = 3.0  # of all slow matches of a pattern
_SLOW = 0.02
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")  # whose comments would have to be parsed
_REMEDY = "write it without repetitions inside repetitions"
_spent: dict[str, float] = {}  # seconds by pattern


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression matches at the start of `name` (as `re.match`). where: whose
    pattern it is, for the message. Raises `LlmqError` for what is no regular expression or goes
    beyond the bounds above."""
    compiled = _compiled(pattern, where)
    return _bounded(compiled.match, pattern, name, where)


def searches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression matches anywhere in `name` (as `re.search`); errors as
    `matches`."""
    compiled = _compiled(pattern, where)
    return _bounded(compiled.search, pattern, name, where)


def matches_shell(pattern: str, name: str, where: str) -> bool:
    """Whether a shell pattern matches the whole of `name` (as `fnmatch.fnmatchcase`); errors as
    `matches`."""
    check_length(pattern, where)
    compiled = _compile(fnmatch.translate(pattern))
    return _bounded(compiled.match, pattern, name, where)


def check(pattern: str, where: str) -> None:
    """Raise `LlmqError` for a regular expression that cannot be used."""
    _compiled(pattern, where)


def check_length(pattern: str, where: str) -> None:
    """Raise `LlmqError` for what is no text of at most `MAX_LENGTH` characters."""
    if not isinstance(pattern, str):
        raise LlmqError(f"{where}: expected a pattern, got {type(pattern).__name__}")
    if len(pattern) > MAX_LENGTH:
        raise LlmqError(
            f"{where}: a pattern of {len(pattern)} characters, expected at most {MAX_LENGTH}; give "
            "several shorter ones"
        )


def repetitions(pattern: str) -> int:
    """How many characters and groups a pattern has when its counted repetitions are written out:
    `(a{3}b){2}` has 8. An estimate from above, without parsing. Raises `ValueError` for groups
    nested deeper than `MAX_DEPTH`."""
    sizes, last = [0], 0  # of the open groups, and of the item before
    position = 0
    while position < len(pattern):
        character = pattern[position]
        count = _COUNT.match(pattern, position) if character == "{" else None
        if count and (count[1] or count[3]):
            times = max(int(count[1] or 0), int(count[3] or 0), 1)
            sizes[-1] += last * (times - 1)
            last *= times
            position = count.end()
            continue
        if character == "[" and (inside := _CLASS.match(pattern, position)):
            last = 1
            sizes[-1] += 1
            position = inside.end()
            continue
        if character == "(":
            sizes.append(0)
            if len(sizes) > MAX_DEPTH:
                raise ValueError(f"groups are nested more than {MAX_DEPTH} deep")
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
        elif character not in "*+?":
            last = 1
            sizes[-1] += 1
        position += 2 if character == "\\" else 1
    return sum(sizes)


def _compiled(pattern: str, where: str) -> regex.Pattern[str]:
    check_length(pattern, where)
    try:
        size = repetitions(pattern)
        if _VERBOSE.search(pattern):
            raise ValueError("the flag x is not supported")
        if size <= MAX_REPETITIONS:
            return _compile(pattern)
    except Exception as error:  # re.error, but also OverflowError or RecursionError
        raise LlmqError(
            f"{where}: not a regular expression ({error or type(error).__name__}); quote the "
            "characters that have a meaning, or use a shell pattern without 're:'"
        ) from None
    raise LlmqError(
        f"{where}: the pattern {pattern!r} stands for {size} characters, expected at most "
        f"{MAX_REPETITIONS}; {_REMEDY}"
    )


@lru_cache(maxsize=16384)
def _compile(pattern: str) -> regex.Pattern[str]:
    re.compile(pattern)  # `regex` knows more, and must not take what others refuse
    return regex.compile(pattern, regex.VERSION0)


def _bounded(match: object, pattern: str, name: str, where: str) -> bool:
    started = time.thread_time()
    try:
        found = match(name, timeout=MAX_SECONDS) is not None  # type: ignore[operator]
    except TimeoutError:
        found, seconds = False, MAX_TOTAL_SECONDS + 1
    else:
        seconds = time.thread_time() - started
    if seconds > _SLOW:
        _spent[pattern] = _spent.get(pattern, 0.0) + seconds
    if _spent.get(pattern, 0.0) > MAX_TOTAL_SECONDS:
        _spent.pop(pattern)
        raise LlmqError(
            f"{where}: the pattern {pattern!r} takes more than {MAX_SECONDS:g} s on {name!r}, or "
            f"{MAX_TOTAL_SECONDS:g} s on all names; {_REMEDY}"
        )
    return found
