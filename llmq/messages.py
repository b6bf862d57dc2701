"""Text from anywhere as one line that is safe to print: names, paths and messages of libraries can
hold line breaks, escape sequences and marks that turn the direction of writing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

LIMIT = 400
_LONGEST_WORD = 80  # of a line that is too long; paths and numbers are shortened before sentences
_SCANNED = 20_000
_SPACE = re.compile(r"[ \t\n\r\f\v]+")
_GAP = "..."


def one_line(text: object, limit: int = LIMIT) -> str:
    """`text` as one line of at most `limit` characters, with everything that is not printable
    written as an escape (`\\x1b`). What is too long is cut in its middle: the end of a message says
    what to do next."""
    shown = escaped(_SPACE.sub(" ", _cut(str(text), _SCANNED)).strip(" "))
    if len(shown) > limit:
        shown = " ".join(_cut(word, _LONGEST_WORD) for word in shown.split(" "))
    return _cut(shown, limit)


def escaped(text: str, keep: str = "") -> str:
    """`text` with control characters, marks of direction, lone surrogates and the like written as
    escapes. keep: characters that stay as they are."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def brief(error: BaseException, limit: int = 160) -> str:
    """What another library's exception says, as part of a message of ours."""
    name, text = type(error).__name__, one_line(error, limit)
    if not text:
        return name
    return text if isinstance(error, ValueError | OSError) else f"{name}: {text}"


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - len(_GAP)) // 2
    return text[: limit - len(_GAP) - tail] + _GAP + text[len(text) - tail :]


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is probably meant, as the end of a message, or nothing."""
    import difflib

    names = {name.lstrip("-").lower(): name for name in known}
    bare = word.lstrip("-").lower()
    starts = [name for name in names if bare and name.startswith(bare)]
    close = starts or difflib.get_close_matches(bare, names, n=1)
    close = close or [name for name in names if len(bare) > 2 and bare in name]
    return f" (did you mean {names[close[0]]}?)" if close else ""


def grouped_notes(notes: Mapping[str, str]) -> list[str]:
    """Notes of layers, those that say the same in one line, with how many they are of and the
    layers as patterns. notes: by name."""
    groups: dict[str, list[str]] = {}
    for name, note in notes.items():
        groups.setdefault(note, []).append(name)
    lines = []
    for note, names in groups.items():
        count = "" if len(names) == 1 else f"{len(names)} layers, "
        lines.append(f"{count}{', '.join(name_patterns(names))}: {note}")
    return lines


def name_patterns(names: Sequence[str]) -> list[str]:
    """Names of layers as few patterns: numbers that differ as `*`, and the last parts of the same
    beginning in braces."""
    if len(names) == 1:
        return [names[0]]
    ends: dict[str, dict[str, None]] = {}
    for name in names:
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        ends.setdefault(".".join(parts[:-1]), {})[parts[-1]] = None
    patterns = []
    for start, found in ends.items():
        if start:
            end = "{" + ",".join(found) + "}" if len(found) > 1 else next(iter(found))
            patterns.append(f"{start}.{end}")
        else:
            patterns += found
    return patterns
