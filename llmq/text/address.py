"""Where a text is, as it is written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmq.errors import LlmqError

Purpose = Literal["train", "calibration", "eval"]


@dataclass(frozen=True)
class Address:
    """`NAME[@REVISION][:CONFIG[:SPLIT]][#COLUMN]`. name: a path here, or a data set of the Hub.
    Empty parts are None."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Paths that are there are taken as they are, whatever marks they hold."""
        if Path(text).exists():
            return cls(text)
        body, _, column = text.partition("#")
        if Path(body).exists():
            return cls(body, column=column or None)
        name, config, split = ([*body.split(":", 2), "", ""])[:3]
        revision = ""
        if not Path(name).exists():
            name, _, revision = name.partition("@")
        return cls(name, revision or None, config or None, split or None, column or None)


def choose_split(
    address: Address, splits: Sequence[str], purpose: Purpose, where: str
) -> str | None:
    """The split to read: the one that is asked for, else the one that is there for the purpose,
    else the only one. None where there are no splits. Raises `LlmqError` that names them."""
    if address.split is not None:
        if splits and address.split not in splits:
            raise LlmqError(f"{where}: no split '{address.split}'; it has {', '.join(splits)}")
        return address.split
    wanted = ("test", "validation") if purpose == "eval" else ("train",)
    for name in wanted:
        if name in splits:
            return name
    if len(splits) > 1:
        config = address.config or ""
        example = f"{address.name}:{config}:{splits[0]}"
        raise LlmqError(
            f"{where}: has no split '{wanted[0]}', but {', '.join(splits)}; name one, such as "
            f"{example}"
        )
    return splits[0] if splits else None
