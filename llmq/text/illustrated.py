"""Rows of text with pictures: turns whose contents are parts, some of which stand for a picture.

Where pictures stand is said by parts `{"type": "image"}` of messages, or by `<image>` in the text;
where nothing says it they stand before the first question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.text.pictures import Picture

COLUMNS = ("images", "image")
MARK = "<image>"
IMAGE: dict[str, Any] = {"type": "image"}

Parts = list[dict[str, Any]]


@dataclass(frozen=True)
class IllustratedRow:
    """where: the row, for messages. turns: each with a role and a list of parts as its content,
    with as many parts of type "image" as there are pictures. is_chat: whether they are turns of a
    conversation, else one text."""

    where: str
    turns: list[dict[str, Any]]
    is_chat: bool
    pictures: tuple[Picture, ...]


def illustrated_row(
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[Picture],
    where: str,
    *,
    is_chat: bool,
) -> IllustratedRow | None:
    """A row whose contents are texts or parts; None where the text has places for another number
    of pictures."""
    found = [{**turn, "content": parts_of(turn["content"])} for turn in turns]
    n_places = sum(part["type"] == "image" for turn in found for part in turn["content"])
    if n_places == 0:
        first = next((turn for turn in found if turn["role"] == "user"), found[0])
        first["content"] = [IMAGE] * len(pictures) + first["content"]
    elif n_places != len(pictures):
        return None
    return IllustratedRow(where, found, is_chat, tuple(pictures))


def parts_of(content: Any) -> Parts:
    """The parts of a content: text, places of pictures; of what else there is (tools, sounds)
    nothing."""
    if isinstance(content, str):
        return _split(content)
    parts: Parts = []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, str):
            parts += _split(part)
        elif isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            parts.append(IMAGE)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts += _split(part["text"])
    return parts


def _split(text: str) -> Parts:
    """Text with marks as parts."""
    parts: Parts = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append(IMAGE)
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
