"""What a model is called outside this machine, and how its config is written down without saying
where on this machine it lay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Keys of configs in which libraries note where a file was read from.
_PLACES = {
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "vocab_file",
    "merges_file",
    "model_name_or_path",
    "base_model_name_or_path",
}
_PATH = re.compile(r"[/\\~.]|[A-Za-z]:[/\\]|.*[/\\].*[/\\]")


def hub_id(model_dir: Path) -> str | None:
    """The Hub id of a folder in the Hub's cache (`models--OWNER--NAME/snapshots/COMMIT`), or
    None."""
    snapshots, repo = model_dir.absolute().parent, model_dir.absolute().parent.parent
    if snapshots.name != "snapshots" or not repo.name.startswith("models--"):
        return None
    return repo.name.removeprefix("models--").replace("--", "/", 1)


def hub_revision(model_dir: Path) -> str | None:
    """The commit of a folder in the Hub's cache, or None."""
    return None if hub_id(model_dir) is None else model_dir.absolute().name


def model_name(model_dir: Path) -> str:
    """What reports and cards call a model: its Hub id, or the name of its folder."""
    return hub_id(model_dir) or model_dir.absolute().name


def source_name(source: str) -> str:
    """What reports call a text: the name of a local file or folder, or the Hub data set."""
    return Path(source).absolute().name if Path(source).exists() else source


def without_places(data: Any, name: str | None = None) -> Any:
    """JSON data without the paths in which libraries note where they read it, at any depth. name:
    the Hub id that `_name_or_path` becomes at the top, or None to leave it out there as well."""
    if isinstance(data, list):
        return [without_places(each) for each in data]
    if not isinstance(data, dict):
        return data
    kept = {
        key: without_places(value)
        for key, value in data.items()
        if not (key in _PLACES and isinstance(value, str) and _PATH.match(value))
        and key != "_name_or_path"
    }
    return kept if name is None else {"_name_or_path": name, **kept}
