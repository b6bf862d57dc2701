"""Which model a result was made of: its name on the Hub, its commit, and what its card says.

Nothing is guessed. A folder of the Hub's cache says its own name. Any other may say one in its card
or its config.json, and the result's card tells which of them did; else it names no base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmq.cards.head import CARD, carried, read_head
from llmq.errors import LlmqError
from llmq.models.identity import hub_id, hub_revision, model_name
from llmq.models.low_precision import stated_settings
from llmq.storage.json_files import read_object

RECORD = "base_model"  # of a report
QUANTIZED, FINE_TUNED = "quantized", "finetune"
RELATIONS = (QUANTIZED, FINE_TUNED, "merge", "adapter")
UNNAMED = "a model in memory"
CACHE, IN_CARD, CONFIG = "cache", "card", "config"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_STEP = re.compile(r"checkpoint-\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """name: what to call it. ids: on the Hub; none where nothing says one, several where a card
    does. revision: its commit, where that is known. relation: of the result to it, as the Hub calls
    it. named_by: what says the ids, "cache", "card", "config" or "". head: what the source's card
    says and the result's says again."""

    name: str
    ids: tuple[str, ...] = ()
    revision: str | None = None
    relation: str = QUANTIZED
    named_by: str = ""
    head: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a report: everything but the head."""
        data = asdict(self)
        data.pop("head")
        return {**data, "ids": list(self.ids)}

    @classmethod
    def of_report(cls, report: Mapping[str, Any], head: dict[str, Any]) -> Base | None:
        """What a report has of it, None where that is no record of llmq."""
        record = report.get(RECORD)
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            return None
        ids, revision, relation = (record.get(key) for key in ("ids", "revision", "relation"))
        return cls(
            record["name"],
            tuple(filter(is_id, ids)) if isinstance(ids, list) else (),
            revision if isinstance(revision, str) else None,
            relation if relation in RELATIONS else QUANTIZED,
            str(record.get("named_by")),
            head,
        )


def base_of(folder: Path) -> Base:
    """The model in a folder, or the one that it was quantized from. The folder is the source of a
    result."""
    own = read_head(folder / CARD)
    name, head, stated = model_name(folder), carried(own), _object(folder / "config.json")
    is_packed = _is_packed(folder, stated)
    if is_packed and (recorded := Base.of_report(_object(folder / "report.json"), head)):
        return recorded
    own_id, in_card = hub_id(folder), _ids(own.get("base_model"))
    if own_id is not None and not (is_packed and in_card):
        return Base(name, (own_id,), hub_revision(folder), QUANTIZED, CACHE, head)
    if in_card:
        return Base(name, in_card, None, _relation(own, is_packed), IN_CARD, head)
    ids = _ids(stated.get("_name_or_path"))
    return Base(name, ids, None, QUANTIZED, CONFIG if ids else "", head)


def _relation(head: Mapping[str, Any], is_packed: bool) -> str:
    """How a model came from those that its card names. Where the card does not say, one in full
    precision came by training."""
    relation = head.get("base_model_relation")
    if relation in RELATIONS:
        return str(relation)
    return QUANTIZED if is_packed else FINE_TUNED


def is_id(name: object) -> bool:
    """Whether a text looks like the name of a model on the Hub: OWNER/NAME, and no folder of a
    training run."""
    if not isinstance(name, str) or _ID.fullmatch(name) is None:
        return False
    return _STEP.fullmatch(name.partition("/")[2]) is None


def _ids(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(filter(is_id, values))


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a result rather than what results are made of."""
    return _is_packed(folder, _object(folder / "config.json"))


def _is_packed(folder: Path, stated: dict[str, Any]) -> bool:
    if stated_settings(stated) is not None:  # published in few bits and nothing else
        return False
    has_settings = "quantization_config" in stated
    return has_settings or (folder / "quantize_config.json").is_file()


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that says nothing of the weights here; nothing without one."""
    try:
        return read_object(path, "JSON") if path.is_file() else {}
    except LlmqError:
        return {}
